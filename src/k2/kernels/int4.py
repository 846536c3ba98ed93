"""INT4 in groups: fake quantisation with a straight-through gradient, and a product with packed weights.

Values, scales and packing are those of `k2.quant.int4`, bit for bit: scale = bfloat16(max|w| / 7.5),
q = round(w / scale), and the weight that counts is the bfloat16 product q * scale.

Letters in shapes: M rows, O outputs, I inputs, G groups per output, P = I / 8 packed integers.
"""

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.kernels.launch import Launch, Work, gemm_work
from k2.kernels.runtime import (
    Int,
    Ptr,
    Tile,
    blocks,
    dot,
    grouped_order,
    jit,
    rounded,
    runs_here,
    tile_for,
)
from k2.quant.int4 import HALF_RANGE, ZERO_SCALE, dequantize, quantize, unpack

QUANTIZE_TILES = {arch: Tile({"GROUPS": 64}, num_warps=4) for arch in (80, 90, 100)}
TILES = {
    80: Tile({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    90: Tile({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    100: Tile({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
}
_HALF_RANGE, _ZERO_SCALE = tl.constexpr(HALF_RANGE), tl.constexpr(ZERO_SCALE)
_TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Added and taken away again it rounds a float32 below 2^22 to the nearest integer, halves to even."""


@jit
def fake_quantize_kernel(w_N: Ptr, y_N: Ptr, groups: Int, GROUPS: tl.constexpr, SIZE: tl.constexpr) -> None:
    """GROUPS groups; divisions are rounded as IEEE wants it, Triton's ordinary one is not."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    open = (group < groups)[:, None]
    w = tl.load(w_N + at, mask=open, other=0.0).to(tl.float32)
    scale = rounded(tl.div_rn(tl.max(tl.abs(w), 1), _HALF_RANGE), tl.bfloat16).to(tl.float32)
    scale = tl.where(scale == 0.0, _ZERO_SCALE, scale)
    q = tl.div_rn(w, tl.broadcast_to(scale[:, None], w.shape)) + _TO_INTEGER - _TO_INTEGER
    q = tl.minimum(tl.maximum(q, -8.0), 7.0)
    y = rounded(q * scale[:, None], tl.bfloat16).to(tl.float32)
    tl.store(y_N + at, rounded(y, y_N.dtype.element_ty), mask=open)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group_size: int) -> Tensor:
        tile, y = tile_for(QUANTIZE_TILES, weight), torch.empty_like(weight)
        groups = weight.numel() // group_size
        grid = (max(1, blocks(groups, tile.sizes["GROUPS"])),)
        fake_quantize_kernel[grid](weight, y, groups, SIZE=group_size, **tile.options())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize(weight: Tensor, group_size: int) -> Tensor:
    """What an INT4 export of contiguous `weight` [..., I] gives back, in its type; the gradient is the output's.

    `group_size` is a power of two that divides I.
    """
    if not runs_here(weight, "fake_quantize"):
        exact = dequantize(*quantize(weight.detach(), group_size)).to(weight.dtype)
        return weight + (exact - weight).detach() if weight.requires_grad else exact
    result: Tensor = _FakeQuantize.apply(weight, group_size)  # type: ignore[no-untyped-call]
    return result


@jit
def product_kernel(
    x_MI: Ptr, packed_OP: Ptr, scale_OG: Ptr, y_MO: Ptr, M: Int, O: Int, I: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of x w^T; weights become bfloat16 in registers, eight of each integer, lowest bits first."""
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(O, BN), GROUP)
    rows, outputs = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    inner, word, part = tl.arange(0, BK), tl.arange(0, BK // 8), tl.arange(0, BK // SIZE)
    row_open, output_open = (rows < M)[:, None], (outputs < O)[:, None]
    x = x_MI + rows.to(tl.int64)[:, None] * I + inner[None, :]
    packed = packed_OP + outputs.to(tl.int64)[:, None] * (I // 8) + word[None, :]
    scale = scale_OG + outputs.to(tl.int64)[:, None] * (I // SIZE) + part[None, :]
    shift = (4 * tl.arange(0, 8))[None, None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, I, BK):
        a = tl.load(x, mask=row_open & (inner < I - k)[None, :], other=0.0)
        words = tl.load(packed, mask=output_open & (word < (I - k) // 8)[None, :], other=0)
        scales = tl.load(scale, mask=output_open & (part < (I - k) // SIZE)[None, :], other=0.0).to(tl.float32)
        q = tl.reshape((words[:, :, None] >> shift) & 15, (BN, BK)) - 8
        spread = tl.reshape(tl.broadcast_to(scales[:, :, None], (BN, BK // SIZE, SIZE)), (BN, BK))
        w = rounded(q.to(tl.float32) * spread, tl.bfloat16).to(x_MI.dtype.element_ty)
        total = dot(a, tl.trans(w), total)
        x += BK
        packed += BK // 8
        scale += BK // SIZE
    y = y_MO + rows.to(tl.int64)[:, None] * O + outputs[None, :]
    tl.store(y, rounded(total, y_MO.dtype.element_ty), mask=row_open & (outputs < O)[None, :])


def reference(x_MI: Tensor, packed_OP: Tensor, scale_OG: Tensor) -> Tensor:
    """The same in torch, the weight unpacked first."""
    return x_MI @ dequantize(unpack(packed_OP), scale_OG).to(x_MI.dtype).T


def int4_product(x_MI: Tensor, packed_OP: Tensor, scale_OG: Tensor) -> Tensor:
    """x w^T with a weight packed by `k2.quant.int4.pack`, [M, O]; no gradient, for generation and evaluation.

    All contiguous; groups are of 16, 32 or 64 inputs.
    """
    if not runs_here(x_MI, "int4_product"):
        return reference(x_MI, packed_OP, scale_OG)
    (M, I), O = x_MI.shape, packed_OP.shape[0]
    tile = tile_for(TILES, x_MI)
    y_MO = x_MI.new_empty(M, O)
    if M:
        product_kernel[(blocks(M, tile.sizes["BM"]) * blocks(O, tile.sizes["BN"]),)](
            x_MI, packed_OP, scale_OG, y_MO, M, O, I, SIZE=I // scale_OG.shape[1], **tile.options()
        )
    return y_MO


def _launches() -> tuple[Launch, ...]:
    """Fake quantisation of 24 experts' gate and up; a batch of 2,048 tokens through one expert's gate and up."""
    M, O, I, size, tile = 2048, 4096, 7168, 32, TILES[90]
    numbers, groups = 24 * O * I, QUANTIZE_TILES[90].sizes["GROUPS"]
    group = groups * size
    quantizing = Work(6.0 * numbers, 6.0 * numbers, 6.0 * group, 6.0 * group, blocks(numbers, group))
    work = gemm_work(M, O, I, tile)
    work = replace(
        work,
        bytes=2.0 * (M * I + M * O) + O * I * 4.5 / 8,
        tile_bytes=tile.sizes["BK"] * (2.0 * tile.sizes["BM"] + tile.sizes["BN"] * 4.5 / 8),
    )
    product: dict[str, str | int] = {"x_MI": "*bf16", "packed_OP": "*i32", "scale_OG": "*bf16", "y_MO": "*bf16"}
    return (
        Launch(
            "int4.fake_quantize", f"{numbers} weights in groups of {size}", fake_quantize_kernel, QUANTIZE_TILES,
            {"w_N": "*fp32", "y_N": "*bf16", "groups": numbers // size}, quantizing, {"SIZE": size},
        ),
        Launch(
            "int4.product", f"{M} rows, {I} -> {O}", product_kernel, TILES, product | {"M": M, "O": O, "I": I}, work,
            {"SIZE": size}, matrix=True,
        ),
    )  # fmt: skip


LAUNCHES = _launches()
