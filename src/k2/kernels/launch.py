"""One launch of a kernel at a size of Kimi K2: what it is compiled for, and what it has to compute and move."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from k2.kernels.runtime import Tile, Tiles


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a launch.

    flops: multiplications and additions; those of masked tiles that are skipped do not count.
    bytes: global memory read and written when every operand moves once.
    tile_flops, tile_bytes: of one step of a program's inner loop, all operands read from L2 or global memory.
    programs: size of the grid.
    """

    flops: float
    bytes: float
    tile_flops: float
    tile_bytes: float
    programs: int


@dataclass(frozen=True)
class Launch:
    """A kernel and its arguments.

    arguments: a pointer as "*bf16", a float as "fp32", an integer as the value it has at this size.
    constants: compile-time arguments that do not come from the tile.
    work: of the sm_90 tile.
    matrix: whether tensor cores must do the work.
    """

    name: str
    size: str
    kernel: Any
    tiles: Tiles
    arguments: Mapping[str, str | int]
    work: Work
    constants: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False

    def tile(self, arch: int) -> Tile:
        """Sizes on one architecture."""
        return self.tiles[arch]


def gemm_work(m: int, n: int, k: int, tile: Tile, item: int = 2, batch: int = 1) -> Work:
    """A matrix product [m, k] x [k, n] of `item`-byte operands and results, `batch` times."""
    block_m, block_n, block_k = tile.sizes["BM"], tile.sizes["BN"], tile.sizes["BK"]
    return Work(
        flops=2.0 * batch * m * n * k,
        bytes=float(item) * batch * (m * k + k * n + m * n),
        tile_flops=2.0 * block_m * block_n * block_k,
        tile_bytes=float(item) * block_k * (block_m + block_n),
        programs=batch * -(-m // block_m) * -(-n // block_n),
    )
