"""INT4 pack + unpack against compressed-tensors: the same bytes, interleaved runs, one thread.

python benchmarks/quant.py
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from torch import Tensor

from k2.quant.int4 import pack, unpack

SHAPES = {"gate_proj of a Kimi K2 expert": (2048, 7168), "down_proj of a Kimi K2 expert": (7168, 2048)}
ROUNDS = 7


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


def measure(shape: tuple[int, int]) -> list[float]:
    """Ratios peer / ours of interleaved rounds, after one that warms up and proves the bytes equal."""
    values = torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    if not (torch.equal(pack(values), pack_to_int32(values, 4)) and torch.equal(ours(values), theirs(values))):
        raise SystemExit("not bit-equal to compressed-tensors")
    return [seconds(theirs, values) / seconds(ours, values) for _ in range(ROUNDS)]


def main() -> None:
    """Print one JSON row per shape."""
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        ratios = measure(shape)
        row = {
            "claim": f"INT4 pack + unpack, {name} {list(shape)}",
            "peer": "compressed-tensors",
            "ratio": round(statistics.median(ratios), 2),
            "low": round(min(ratios), 2),
            "high": round(max(ratios), 2),
            "target": 3.0,
            "better": "higher",
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
