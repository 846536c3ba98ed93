"""What all kernels share: where they may run, which tile a GPU gets, and the dot product.

A kernel runs on a CUDA GPU, or on CPU tensors when TRITON_INTERPRET=1 was set before the first import of Triton.
Anywhere else its torch reference runs, and says so once.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger(__name__)

Ptr: TypeAlias = tl.tensor
Int: TypeAlias = tl.tensor
Float: TypeAlias = tl.tensor
Block: TypeAlias = tl.tensor
"""What a kernel is passed: pointers, numbers and, in its helpers, blocks of values."""

INTERPRETING: bool = triton.knobs.runtime.interpret
INTERPRETED = tl.constexpr(INTERPRETING)

FALLBACK_ARCH = 80


@dataclass(frozen=True)
class Tile:
    """Compile-time sizes of a kernel and how many warps and pipeline stages run them."""

    sizes: Mapping[str, int]
    num_warps: int
    num_stages: int = 1

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


Tiles = Mapping[int, Tile]
"""The tile of each compute capability (80 A100, 90 H100, 100 B200) that a kernel is tuned for."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, typed."""
    return triton.jit(function)


def tile_for(tiles: Tiles, x: Tensor) -> Tile:
    """The tile of the device of `x`: that of the newest tuned architecture it can run; the interpreter's is sm_90."""
    if not x.is_cuda:
        return tiles[90]
    major, minor = torch.cuda.get_device_capability(x.device)
    known = [arch for arch in tiles if arch <= 10 * major + minor]
    return tiles[max(known, default=FALLBACK_ARCH)]


def runs_here(x: Tensor, name: str) -> bool:
    """Whether kernel `name` can work on `x`; if it cannot, the log says once that the torch reference does."""
    if x.is_cuda or INTERPRETING:
        return True
    _warn(name, x.device.type)
    return False


@functools.cache
def _warn(name: str, device: str) -> None:
    logger.warning("kernel %s needs a CUDA GPU, tensors are on %s: the torch reference runs instead", name, device)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


@jit
def dot(a: Block, b: Block, accumulator: Block) -> Block:
    """accumulator + a b on tensor cores; the interpreter multiplies bfloat16 bit patterns, so it gets float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator)


@jit
def rounded(x: Block, dtype: tl.constexpr) -> Block:
    """float32 to `dtype`, to nearest even; the interpreter would truncate to bfloat16, so its bits are made here."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@jit
def grouped_order(pid: Int, tiles_m: Int, tiles_n: Int, GROUP: tl.constexpr) -> tuple[Int, Int]:
    """Tile row and column of a program; `GROUP` rows are walked together so that their operands stay in L2."""
    first = pid // (GROUP * tiles_n) * GROUP
    rows = min(tiles_m - first, GROUP)
    within = pid % (GROUP * tiles_n)
    return first + within % rows, within // rows
