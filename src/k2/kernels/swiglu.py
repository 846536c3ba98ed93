"""SwiGLU: silu(gate) * up of a fused [N, 2F], keeping only its input; the backward pass computes the rest again.

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
def forward_kernel(x_NG: Ptr, y_NF: Ptr, width: Int, BF: tl.constexpr) -> None:
    """One block of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BF + tl.arange(0, BF)
    open = column < width
    gate = tl.load(x_NG + row * 2 * width + column, mask=open, other=0.0).to(tl.float32)
    up = tl.load(x_NG + row * 2 * width + width + column, mask=open, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_NF + row * width + column, rounded(y, y_NF.dtype.element_ty), mask=open)


@jit
def backward_kernel(g_NF: Ptr, x_NG: Ptr, dx_NG: Ptr, width: Int, BF: tl.constexpr) -> None:
    """Both gradients of one block of one row: silu' = s (1 + gate (1 - s)) with s = sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BF + tl.arange(0, BF)
    open = column < width
    g = tl.load(g_NF + row * width + column, mask=open, other=0.0).to(tl.float32)
    gate = tl.load(x_NG + row * 2 * width + column, mask=open, other=0.0).to(tl.float32)
    up = tl.load(x_NG + row * 2 * width + width + column, mask=open, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dtype = dx_NG.dtype.element_ty
    tl.store(dx_NG + row * 2 * width + column, rounded(g * up * s * (1 + gate * (1 - s)), dtype), mask=open)
    tl.store(dx_NG + row * 2 * width + width + column, rounded(g * gate * s, dtype), mask=open)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NG: Tensor) -> Tensor:
        ctx.save_for_backward(x_NG)
        N, width = x_NG.shape[0], x_NG.shape[1] // 2
        tile = tile_for(TILES, x_NG)
        y_NF = x_NG.new_empty(N, width)
        if N:
            forward_kernel[(N, blocks(width, tile.sizes["BF"]))](x_NG, y_NF, width, **tile.options())
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        (x_NG,) = ctx.saved_tensors
        N, width = grad_NF.shape
        tile = tile_for(TILES, x_NG)
        grad_x = torch.empty_like(x_NG)
        if N:
            grid = (N, blocks(width, tile.sizes["BF"]))
            backward_kernel[grid](grad_NF.contiguous(), x_NG, grad_x, width, **tile.options())
        return grad_x


def reference(x: Tensor) -> Tensor:
    """The same in torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last axis, [..., 2F] -> [..., F], computed in float32."""
    if not runs_here(x, "swiglu"):
        return reference(x)
    rows: Tensor = _Swiglu.apply(x.contiguous().flatten(0, -2))  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], x.shape[-1] // 2)


def _launches() -> tuple[Launch, ...]:
    N, width, block = 32768, 2048, TILES[90].sizes["BF"]
    arguments: dict[str, str | int] = {"x_NG": "*bf16", "y_NF": "*bf16", "g_NF": "*bf16", "dx_NG": "*bf16"}
    arguments["width"] = width
    programs = N * blocks(width, block)
    forward = Work(5.0 * N * width, 6.0 * N * width, 5.0 * block, 6.0 * block, programs)
    backward = Work(12.0 * N * width, 10.0 * N * width, 12.0 * block, 10.0 * block, programs)
    size = f"{N} rows of 2 x {width}"
    return (
        Launch("swiglu.forward", size, forward_kernel, TILES, arguments, forward),
        Launch("swiglu.backward", size, backward_kernel, TILES, arguments, backward),
    )


LAUNCHES = _launches()
