"""SwiGLU: silu(gate) * up of a fused [N, 2F], times one number a row, keeping only its inputs.

The backward pass gives the output once more, which the gradient of the down projection needs: it is never kept.

Letters in shapes: N rows, F inner width.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.kernels.launch import Launch, Work
from k2.kernels.runtime import Int, Ptr, Tile, blocks, jit, rounded, runs_here, tile_for

TILES = {arch: Tile({"BF": 1024}, num_warps=4) for arch in (80, 90, 100)}


@jit
def forward_kernel(x_NG: Ptr, scale_N: Ptr, y_NF: Ptr, width: Int, BF: tl.constexpr) -> None:
    """One block of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BF + tl.arange(0, BF)
    open = column < width
    gate = tl.load(x_NG + row * 2 * width + column, mask=open, other=0.0).to(tl.float32)
    up = tl.load(x_NG + row * 2 * width + width + column, mask=open, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up * tl.load(scale_N + row)
    tl.store(y_NF + row * width + column, rounded(y, y_NF.dtype.element_ty), mask=open)


@jit
def backward_kernel(
    g_NF: Ptr, x_NG: Ptr, scale_N: Ptr, dx_NG: Ptr, dscale_N: Ptr, y_NF: Ptr, width: Int, BF: tl.constexpr
) -> None:
    """Both gradients of one row, and its output again: silu' = s (1 + gate (1 - s)) with s = sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_N + row)
    dscale = tl.zeros((BF,), tl.float32)
    dtype = dx_NG.dtype.element_ty
    for first in range(0, width, BF):
        column = first + tl.arange(0, BF)
        open = column < width
        g = tl.load(g_NF + row * width + column, mask=open, other=0.0).to(tl.float32)
        gate = tl.load(x_NG + row * 2 * width + column, mask=open, other=0.0).to(tl.float32)
        up = tl.load(x_NG + row * 2 * width + width + column, mask=open, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        product = gate * s * up
        dscale += g * product
        tl.store(y_NF + row * width + column, rounded(product * scale, dtype), mask=open)
        g = g * scale
        tl.store(dx_NG + row * 2 * width + column, rounded(g * up * s * (1 + gate * (1 - s)), dtype), mask=open)
        tl.store(dx_NG + row * 2 * width + width + column, rounded(g * gate * s, dtype), mask=open)
    tl.store(dscale_N + row, tl.sum(dscale, 0))


def gated(x_NG: Tensor, scale_N: Tensor) -> Tensor:
    """silu(first half) * second half of each contiguous row, times the row's float32 scale; without gradient."""
    N, width = x_NG.shape[0], x_NG.shape[1] // 2
    tile = tile_for(TILES, x_NG)
    y_NF = x_NG.new_empty(N, width)
    if N:
        forward_kernel[(N, blocks(width, tile.sizes["BF"]))](x_NG, scale_N, y_NF, width, **tile.options())
    return y_NF


def gated_backward(grad_NF: Tensor, x_NG: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [N, 2F] and [N] of `gated`, and its output once more, [N, F]."""
    (N, width), tile = grad_NF.shape, tile_for(TILES, x_NG)
    grad_x, grad_scale, y_NF = torch.empty_like(x_NG), torch.empty_like(scale_N), x_NG.new_empty(N, width)
    if N:
        backward_kernel[(N,)](
            grad_NF.contiguous(), x_NG, scale_N, grad_x, grad_scale, y_NF, width, **tile.options()
        )  # fmt: skip
    return grad_x, grad_scale, y_NF


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NG: Tensor, scale_N: Tensor) -> Tensor:
        ctx.save_for_backward(x_NG, scale_N)
        return gated(x_NG, scale_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_scale, _ = gated_backward(grad_NF, *ctx.saved_tensors)
        return grad_x, grad_scale


def reference(x_NG: Tensor, scale_N: Tensor) -> Tensor:
    """The same in torch."""
    gate, up = x_NG.to(torch.promote_types(x_NG.dtype, scale_N.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * up * scale_N[:, None]).to(x_NG.dtype)


def swiglu(x_NG: Tensor, scale_N: Tensor) -> Tensor:
    """silu(first half) * second half of each row, times its scale in float32: [N, 2F] -> [N, F].

    The scale is the routing weight of an expert's row, or one.
    """
    if not runs_here(x_NG, "swiglu"):
        return reference(x_NG, scale_N)
    result: Tensor = _Swiglu.apply(x_NG.contiguous(), scale_N.contiguous())  # type: ignore[no-untyped-call]
    return result


def _launches() -> tuple[Launch, ...]:
    N, width, block = 32768, 2048, TILES[90].sizes["BF"]
    arguments: dict[str, str | int] = {"x_NG": "*bf16", "y_NF": "*bf16", "g_NF": "*bf16", "dx_NG": "*bf16"}
    arguments |= {"scale_N": "*fp32", "dscale_N": "*fp32", "width": width}
    forward = Work(6.0 * N * width, 6.0 * N * width + 4 * N, 6.0 * block, 6.0 * block, N * blocks(width, block))
    backward = Work(16.0 * N * width, 12.0 * N * width + 8 * N, 16.0 * block, 12.0 * block, N)
    size = f"{N} rows of 2 x {width}"
    return (
        Launch("swiglu.forward", size, forward_kernel, TILES, arguments, forward),
        Launch("swiglu.backward", size, backward_kernel, TILES, arguments, backward),
    )


LAUNCHES = _launches()
