"""RMSNorm: x / rms(x) * weight; the backward pass computes the statistics again instead of keeping them.

Letters in shapes: N rows, D width, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.kernels.launch import Launch, Work
from k2.kernels.runtime import Float, Int, Ptr, Tile, blocks, jit, rounded, runs_here, tile_for

TILES = {arch: Tile({}, num_warps=16) for arch in (80, 90, 100)}
BACKWARD_TILES = {arch: Tile({"ROWS": 16}, num_warps=32) for arch in (80, 90, 100)}
"""A program of the backward pass sums the weight's gradient over ROWS rows."""


@jit
def forward_kernel(x_ND: Ptr, w_D: Ptr, y_ND: Ptr, D: Int, eps: Float, WIDTH: tl.constexpr) -> None:
    """One row; x / rms(x) is rounded to the input's precision before the weight multiplies it, as DeepSeek does."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    open = column < D
    x = tl.load(x_ND + row * D + column, mask=open, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    dtype = y_ND.dtype.element_ty
    w = rounded(tl.load(w_D + column, mask=open, other=0.0).to(tl.float32), dtype).to(tl.float32)
    y = rounded(x * scale, dtype).to(tl.float32) * w
    tl.store(y_ND + row * D + column, rounded(y, dtype), mask=open)


@jit
def backward_kernel(
    g_ND: Ptr, x_ND: Ptr, w_D: Ptr, dx_ND: Ptr, dw_PD: Ptr, N: Int, D: Int, eps: Float,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """dx = scale (g w - n mean(g w n)) with n = x scale, for ROWS rows, and their part of dw = sum g n."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, WIDTH)
    open = column < D
    w = tl.load(w_D + column, mask=open, other=0.0).to(tl.float32)
    dw = tl.zeros((WIDTH,), tl.float32)
    for row in range(first, min(first + ROWS, N)):
        x = tl.load(x_ND + row * D + column, mask=open, other=0.0).to(tl.float32)
        g = tl.load(g_ND + row * D + column, mask=open, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
        n = x * scale
        dw += g * n
        inner = g * w
        dx = scale * (inner - n * (tl.sum(inner * n, 0) / D))
        tl.store(dx_ND + row * D + column, rounded(dx, dx_ND.dtype.element_ty), mask=open)
    tl.store(dw_PD + tl.program_id(0).to(tl.int64) * D + column, dw, mask=open)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_ND, weight_D)
        ctx.eps = eps
        N, D = x_ND.shape
        y_ND = torch.empty_like(x_ND)
        if N:
            options = tile_for(TILES, x_ND).options()
            forward_kernel[(N,)](x_ND, weight_D, y_ND, D, eps, WIDTH=triton.next_power_of_2(D), **options)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D = ctx.saved_tensors
        N, D = x_ND.shape
        tile = tile_for(BACKWARD_TILES, x_ND)
        grad_x = torch.empty_like(x_ND)
        programs = blocks(N, tile.sizes["ROWS"])
        partial_PD = x_ND.new_empty(programs, D, dtype=torch.float32)
        if N:
            backward_kernel[(programs,)](
                grad_ND.contiguous(), x_ND, weight_D, grad_x, partial_PD, N, D, ctx.eps,
                WIDTH=triton.next_power_of_2(D), **tile.options(),
            )  # fmt: skip
        return grad_x, partial_PD.sum(0).to(weight_D.dtype), None


def reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same in torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight_D.to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, statistics in float32; [..., D] -> [..., D]."""
    if not runs_here(x, "rms_norm"):
        return reference(x, weight_D, eps)
    rows: Tensor = _RMSNorm.apply(x.contiguous().flatten(0, -2), weight_D, eps)  # type: ignore[no-untyped-call]
    return rows.view_as(x)


def _launches() -> tuple[Launch, ...]:
    N, D, rows = 4096, 7168, BACKWARD_TILES[90].sizes["ROWS"]
    arguments: dict[str, str | int] = dict.fromkeys(("x_ND", "y_ND", "g_ND", "dx_ND"), "*bf16")
    arguments |= {"w_D": "*fp32", "dw_PD": "*fp32", "N": N, "D": D, "eps": "fp32"}
    width = {"WIDTH": triton.next_power_of_2(D)}
    forward = Work(4.0 * N * D, 4.0 * N * D + 4 * D, 4.0 * D, 4.0 * D, N)
    programs = blocks(N, rows)
    backward = Work(11.0 * N * D, 6.0 * N * D + 4 * D * (programs + 1), 11.0 * D, 6.0 * D, programs)
    size = f"{N} rows of {D}"
    return (
        Launch("rms_norm.forward", size, forward_kernel, TILES, arguments, forward, width),
        Launch("rms_norm.backward", size, backward_kernel, BACKWARD_TILES, arguments, backward, width),
    )


LAUNCHES = _launches()
