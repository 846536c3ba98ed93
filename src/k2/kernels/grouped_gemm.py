"""Grouped matrix product of experts: contiguous rows of each expert times its matrix, forward and both gradients.

Groups may be uneven or empty. Nothing waits for the host: each program finds its expert from the offsets on the GPU,
and the grid is the largest number of tiles that any division of the rows can need.

Letters in shapes: N rows, E experts, O outputs, I inputs.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.kernels.launch import Launch, gemm_work
from k2.kernels.runtime import Int, Ptr, Tile, blocks, dot, grouped_order, jit, rounded, runs_here, tile_for

TILES = {
    80: Tile({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=4),
    90: Tile({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    100: Tile({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
}
WEIGHT_GRADIENT_TILES = TILES


@jit
def _find_group(pid_m: Int, offsets_E: Ptr, E: Int, BM: tl.constexpr, EXPERTS: tl.constexpr) -> tuple[Int, Int, Int]:
    """Expert of a row tile, its first row and the end of the expert's rows; expert >= E when no rows are left."""
    index = tl.arange(0, EXPERTS)
    start = tl.load(offsets_E + index, mask=index < E, other=0)
    end = tl.load(offsets_E + index + 1, mask=index < E, other=0)
    tiles = (end - start + BM - 1) // BM
    last = tl.cumsum(tiles, 0)
    expert = tl.sum(((last <= pid_m) & (index < E)).to(tl.int32), 0)
    mine = index == expert
    first_tile = tl.sum(tl.where(mine, last - tiles, 0), 0)
    first_row = tl.sum(tl.where(mine, start, 0), 0) + (pid_m - first_tile) * BM
    return expert, first_row, tl.sum(tl.where(mine, end, 0), 0)


@jit
def rows_kernel(
    x_NI: Ptr, w_EOI: Ptr, y_NO: Ptr, offsets_E: Ptr,
    E: Int, O: Int, I: Int, tiles_m: Int, stride_e: Int, stride_o: Int, stride_i: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """y = x w^T for one tile of one expert; with the strides of w swapped it is the gradient by the rows."""
    pid_m, pid_n = grouped_order(tl.program_id(0), tiles_m, tl.cdiv(O, BN), GROUP)
    expert, first_row, end_row = _find_group(pid_m, offsets_E, E, BM, EXPERTS)
    if expert >= E:
        return
    rows = first_row + tl.arange(0, BM)
    columns = pid_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    row_open, column_open = (rows < end_row)[:, None], (columns < O)[None, :]
    x = x_NI + rows.to(tl.int64)[:, None] * I + inner[None, :]
    w = w_EOI + expert.to(tl.int64) * stride_e + columns[None, :] * stride_o + inner[:, None] * stride_i
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, I, BK):
        if EVEN:
            a = tl.load(x, mask=row_open, other=0.0)
            b = tl.load(w, mask=column_open, other=0.0)
        else:
            a = tl.load(x, mask=row_open & (inner[None, :] < I - k), other=0.0)
            b = tl.load(w, mask=column_open & (inner[:, None] < I - k), other=0.0)
        total = dot(a, b, total)
        x += BK
        w += BK * stride_i
    y = y_NO + rows.to(tl.int64)[:, None] * O + columns[None, :]
    tl.store(y, rounded(total, y_NO.dtype.element_ty), mask=row_open & column_open)


@jit
def weight_kernel(
    g_NO: Ptr, x_NI: Ptr, w_EOI: Ptr, offsets_E: Ptr, O: Int, I: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """w[e] = g[e]^T x[e] for one tile of one expert: zeros where the expert has no rows."""
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(O, BM), tl.cdiv(I, BN), GROUP)
    expert = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_E + expert).to(tl.int64)
    count = tl.load(offsets_E + expert + 1) - start
    outputs = pid_m * BM + tl.arange(0, BM)
    inputs = pid_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    g = g_NO + (start + inner)[None, :] * O + outputs[:, None]
    x = x_NI + (start + inner)[:, None] * I + inputs[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, count, BK):
        open = inner < count - k
        a = tl.load(g, mask=open[None, :] & (outputs < O)[:, None], other=0.0)
        b = tl.load(x, mask=open[:, None] & (inputs < I)[None, :], other=0.0)
        total = dot(a, b, total)
        g += BK * O
        x += BK * I
    w = w_EOI + expert * O * I + outputs[:, None] * I + inputs[None, :]
    tl.store(w, rounded(total, w_EOI.dtype.element_ty), mask=(outputs < O)[:, None] & (inputs < I)[None, :])


def rows_product(x_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """x w^T of every group, [N, O]; `weight_EOI` may have any strides, so its transpose gives the gradient."""
    (N, I), (E, O, _) = x_NI.shape, weight_EOI.shape
    tile = tile_for(TILES, x_NI)
    tiles_m = N // tile.sizes["BM"] + min(E, N)
    y_NO = x_NI.new_empty(N, O)
    if N:
        rows_kernel[(tiles_m * blocks(O, tile.sizes["BN"]),)](
            x_NI, weight_EOI, y_NO, offsets_E, E, O, I, tiles_m, *weight_EOI.stride(),
            EXPERTS=triton.next_power_of_2(E), EVEN=I % tile.sizes["BK"] == 0, **tile.options(),
        )  # fmt: skip
    return y_NO


def weight_product(grad_NO: Tensor, x_NI: Tensor, offsets_E: Tensor) -> Tensor:
    """grad^T x of every group, [E, O, I]."""
    E, O, I = len(offsets_E) - 1, grad_NO.shape[1], x_NI.shape[1]
    tile = tile_for(WEIGHT_GRADIENT_TILES, x_NI)
    result = x_NI.new_empty(E, O, I)
    grid = (blocks(O, tile.sizes["BM"]) * blocks(I, tile.sizes["BN"]), E)
    weight_kernel[grid](grad_NO, x_NI, result, offsets_E, O, I, **tile.options())
    return result


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EOI, offsets_E)
        return rows_product(x_NI, weight_EOI, offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NI, weight_EOI, offsets_E = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_x = rows_product(grad_NO, weight_EOI.mT, offsets_E)
        return grad_x, weight_product(grad_NO, x_NI, offsets_E), None


def reference(x_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """The same in torch, one product per expert."""
    groups = x_NI.tensor_split(offsets_E[1:-1].long().cpu())
    return torch.cat([rows @ weight.T for rows, weight in zip(groups, weight_EOI, strict=True)])


def grouped_gemm(x_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """Multiply each expert's rows with its matrix, [N, O]; differentiable in rows and weights.

    Args:
        x_NI: contiguous rows ordered by expert.
        weight_EOI: contiguous, of the same type as the rows.
        offsets_E: int32 [E + 1] on the same device; expert e owns rows offsets[e] up to offsets[e + 1].
    """
    if not runs_here(x_NI, "grouped_gemm"):
        return reference(x_NI, weight_EOI, offsets_E)
    result: Tensor = _GroupedProduct.apply(x_NI, weight_EOI, offsets_E)  # type: ignore[no-untyped-call]
    return result


def _launches() -> tuple[Launch, ...]:
    """K2 over 16 expert-parallel GPUs: 24 experts here, 4,096 tokens of every GPU with 8 choices, gate and up fused."""
    N, E, O, I = 32768, 24, 4096, 7168
    pointers = {"x_NI": "*bf16", "w_EOI": "*bf16", "y_NO": "*bf16", "g_NO": "*bf16", "offsets_E": "*i32"}
    shape: dict[str, str | int] = {**pointers, "E": E, "O": O, "I": I, "tiles_m": N // 128 + E, "stride_e": O * I}
    back = {**shape, "O": I, "I": O}
    size = f"{N} rows, {E} experts, {I} -> {O}"
    compiled = {"EXPERTS": triton.next_power_of_2(E), "EVEN": True}
    tile, weight_tile = TILES[90], WEIGHT_GRADIENT_TILES[90]
    rows_work, grad_work = gemm_work(N, O, I, tile), gemm_work(N, I, O, tile)
    extra = 2 * (E - 1) * O * I  # the matrices of the other experts
    weights = gemm_work(O, I, N // E, weight_tile, batch=E)
    return (
        Launch(
            "grouped_gemm.forward", size, rows_kernel, TILES, {**shape, "stride_o": I, "stride_i": 1},
            replace(rows_work, bytes=rows_work.bytes + extra), compiled, matrix=True,
        ),
        Launch(
            "grouped_gemm.grad_rows", size, rows_kernel, TILES, {**back, "stride_o": 1, "stride_i": I},
            replace(grad_work, bytes=grad_work.bytes + extra), compiled, matrix=True,
        ),
        Launch(
            "grouped_gemm.grad_weight", size, weight_kernel, WEIGHT_GRADIENT_TILES, shape, weights, matrix=True,
        ),
    )  # fmt: skip


LAUNCHES = _launches()
