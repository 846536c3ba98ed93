"""FP8 (E4M3) with one float32 scale per 1 x 128 tile: activations kept for the backward pass at half their size.

Kimi K2 keeps the inputs of the experts' up projections and SwiGLU so (arXiv 2507.20534, section 2.4.2). scale =
max|x| / 448, the largest finite E4M3 number; a tile of zeros has scale 1.

Letters in shapes: N rows, D width, G tiles per row.
"""

import torch
import triton.language as tl
from torch import Tensor

from k2.kernels.fp8_reference import LARGEST, WIDTH
from k2.kernels.fp8_reference import dequantize as reference_dequantize
from k2.kernels.fp8_reference import quantize as reference_quantize
from k2.kernels.launch import Launch, Work
from k2.kernels.runtime import INTERPRETED, Block, Int, Ptr, Tile, blocks, jit, rounded, runs_here, tile_for

TILES = {
    80: Tile({"BN": 32, "NATIVE": 0}, num_warps=4),
    90: Tile({"BN": 32, "NATIVE": 1}, num_warps=4),
    100: Tile({"BN": 32, "NATIVE": 1}, num_warps=4),
}
"""NATIVE: the GPU converts to E4M3 by itself (from sm_89 on)."""

_WIDTH, _LARGEST = tl.constexpr(WIDTH), tl.constexpr(LARGEST)
_TO_INTEGER, _TO_INTEGER_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x3C800000)


@jit
def encode(x: Block, NATIVE: tl.constexpr) -> Block:
    """E4M3 bits of float32 up to 448 in magnitude, to nearest even."""
    if NATIVE and not INTERPRETED:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:  # noqa: RET505 - Triton compiles one of the two
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 8 * 120
        # Subnormal numbers are multiples of 2^-9.
        subnormal = (tl.abs(x) * 512.0 + _TO_INTEGER).to(tl.int32, bitcast=True) - _TO_INTEGER_BITS
        code = tl.where(magnitude < _SMALLEST_NORMAL_BITS, subnormal, normal)
        code = tl.where(x == x, code, 0x7F)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@jit
def decode(code: Block) -> Block:
    """float32 of E4M3 bits: moved into place they are a number 2^120 times too small, subnormal ones included."""
    magnitude = code.to(tl.int32) & 0x7F
    value = (magnitude << 20).to(tl.float32, bitcast=True) * 2.0**120
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code.to(tl.int32) >= 0x80, -value, value)


@jit
def quantize_kernel(
    x_ND: Ptr, code_ND: Ptr, scale_NG: Ptr, N: Int, D: Int, BN: tl.constexpr, NATIVE: tl.constexpr
) -> None:
    """BN rows of one tile column."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * _WIDTH + tl.arange(0, _WIDTH)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    open = (row < N)[:, None] & (column < D)[None, :]
    x = tl.load(x_ND + at, mask=open, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(x), 1)
    scale = tl.where(top == 0.0, 1.0, tl.div_rn(top, _LARGEST))
    y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    tl.store(code_ND + at, encode(y, NATIVE), mask=open)
    tl.store(scale_NG + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), scale, mask=row < N)


@jit
def dequantize_kernel(
    code_ND: Ptr, scale_NG: Ptr, x_ND: Ptr, N: Int, D: Int, BN: tl.constexpr, NATIVE: tl.constexpr
) -> None:
    """The inverse."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * _WIDTH + tl.arange(0, _WIDTH)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    open = (row < N)[:, None] & (column < D)[None, :]
    scale = tl.load(scale_NG + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), mask=row < N, other=0.0)
    x = decode(tl.load(code_ND + at, mask=open, other=0)) * scale[:, None]
    tl.store(x_ND + at, rounded(x, x_ND.dtype.element_ty), mask=open)


def quantize(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [N, D] and float32 scales [N, G] of contiguous `x_ND`; the last tile may be narrower."""
    if not runs_here(x_ND, "fp8.quantize"):
        return reference_quantize(x_ND)
    (N, D), tile = x_ND.shape, tile_for(TILES, x_ND)
    code_ND = torch.empty_like(x_ND, dtype=torch.uint8)
    scale_NG = x_ND.new_empty(N, blocks(D, WIDTH), dtype=torch.float32)
    if N:
        grid = (blocks(N, tile.sizes["BN"]), blocks(D, WIDTH))
        quantize_kernel[grid](x_ND, code_ND, scale_NG, N, D, **tile.options())
    return code_ND.view(torch.float8_e4m3fn), scale_NG


def dequantize(code_ND: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """Back to `dtype`, [N, D]."""
    if not runs_here(code_ND, "fp8.dequantize"):
        return reference_dequantize(code_ND, scale_NG, dtype)
    (N, D), tile = code_ND.shape, tile_for(TILES, code_ND)
    x_ND = torch.empty_like(code_ND, dtype=dtype)
    if N:
        grid = (blocks(N, tile.sizes["BN"]), blocks(D, WIDTH))
        dequantize_kernel[grid](code_ND.view(torch.uint8), scale_NG, x_ND, N, D, **tile.options())
    return x_ND


def _launches() -> tuple[Launch, ...]:
    N, D, rows = 32768, 7168, TILES[90].sizes["BN"]
    arguments: dict[str, str | int] = {"x_ND": "*bf16", "code_ND": "*u8", "scale_NG": "*fp32", "N": N, "D": D}
    numbers, tile = N * D, rows * WIDTH
    moved = 3.0 * numbers + 4 * N * blocks(D, WIDTH)
    programs = blocks(N, rows) * blocks(D, WIDTH)
    size = f"{N} rows of {D}"
    return (
        Launch(
            "fp8.quantize", size, quantize_kernel, TILES, arguments,
            Work(4.0 * numbers, moved, 4.0 * tile, 3.0 * tile, programs),
        ),
        Launch(
            "fp8.dequantize", size, dequantize_kernel, TILES, arguments,
            Work(2.0 * numbers, moved, 2.0 * tile, 3.0 * tile, programs),
        ),
    )  # fmt: skip


LAUNCHES = _launches()
