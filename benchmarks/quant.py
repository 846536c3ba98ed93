"""INT4 pack + unpack against compressed-tensors: the same bytes, interleaved runs, one thread.

python benchmarks/quant.py
"""

import time
from collections.abc import Callable, Iterator

import torch
from _table import Row, row, run
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from torch import Tensor

from k2.quant.int4 import pack, unpack

SHAPES = {"gate_proj of a Kimi K2 expert": (2048, 7168), "down_proj of a Kimi K2 expert": (7168, 2048)}


def ours(values: Tensor) -> Tensor:
    """Pack and unpack."""
    return unpack(pack(values))


def theirs(values: Tensor) -> Tensor:
    """Pack and unpack with the peer."""
    return unpack_from_int32(pack_to_int32(values, 4), 4, values.shape)


def seconds(function: Callable[[Tensor], Tensor], values: Tensor) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    function(values)
    return time.process_time() - started


def measure(shape: tuple[int, int], rounds: int) -> list[float]:
    """Ratios peer / ours of interleaved rounds, after one that warms up and proves the bytes equal."""
    values = torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    if not (torch.equal(pack(values), pack_to_int32(values, 4)) and torch.equal(ours(values), theirs(values))):
        raise SystemExit("not bit-equal to compressed-tensors")
    return [seconds(theirs, values) / seconds(ours, values) for _ in range(rounds)]


def rows(rounds: int) -> Iterator[Row]:
    """One row per shape."""
    for name, shape in SHAPES.items():
        claim = f"INT4 pack + unpack, {name} {list(shape)}"
        yield row(claim, "compressed-tensors", measure(shape, rounds), 3.0)


if __name__ == "__main__":
    run(__doc__, rows, 7)
