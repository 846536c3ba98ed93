"""How logical tensors are stored in safetensors files: types, sizes, and how files are cut. Torch-free.

A logical tensor is stored as one tensor of its own name, or, quantised, as several whose names extend it:

fp8   `weight` (e4m3) and `weight_scale_inv`: one float32 factor for each block of 128 x 128 weights
      (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), in every projection but the router and the head.
int4  `weight_packed`, `weight_scale`, `weight_shape`: compressed-tensors' `pack-quantized`, in the routed experts.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

from k2.model.layout import LogicalTensor

Format = Literal["fp32", "bf16", "fp8", "int4"]

FP8_BLOCK = (128, 128)
INT4_GROUP = 32
PACKED_VALUES = 8
"""INT4 values in one int32."""

ITEM_BYTES = {"I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
"""Bytes of one value by safetensors' name of its type, in the order in which safetensors lays tensors out."""

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; `dtype` is safetensors' name of its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: the logical tensors it holds and the tensors they are stored as."""

    file: str
    tensors: tuple[LogicalTensor, ...]
    stored: tuple[StoredTensor, ...]


def fp8_parts(name: str, shape: tuple[int, ...], block: tuple[int, int] = FP8_BLOCK) -> tuple[StoredTensor, ...]:
    """Weight and block factors of an FP8 matrix."""
    factors = (ceil(shape[0] / block[0]), ceil(shape[1] / block[1]))
    return StoredTensor(name, "F8_E4M3", shape), StoredTensor(f"{name}_scale_inv", "F32", factors)


def int4_parts(name: str, shape: tuple[int, ...], group_size: int = INT4_GROUP) -> tuple[StoredTensor, ...]:
    """Packed values, scales and shape of an INT4 matrix."""
    rows, columns = shape
    return (
        StoredTensor(f"{name}_packed", "I32", (rows, ceil(columns / PACKED_VALUES))),
        StoredTensor(f"{name}_scale", "BF16", (rows, ceil(columns / group_size))),
        StoredTensor(f"{name}_shape", "I32", (2,)),
    )


def stored(tensor: LogicalTensor, form: Format, group_size: int = INT4_GROUP) -> tuple[StoredTensor, ...]:
    """What a format stores for a logical tensor. Selection biases keep float32: bfloat16 loses their steps of 0.001."""
    if form == "int4" and tensor.quantized:
        return int4_parts(tensor.name, tensor.shape, group_size)
    if form == "fp8" and tensor.group == "muon" and tensor.component != "gate":
        return fp8_parts(tensor.name, tensor.shape)
    wide = form == "fp32" or tensor.group == "none"
    return (StoredTensor(tensor.name, "F32" if wide else "BF16", tensor.shape),)


def weight_bytes(layout: Iterable[LogicalTensor], form: Format, group_size: int = INT4_GROUP) -> int:
    """Bytes that a format takes for these tensors, file headers left out."""
    # K2 has 69,120 expert matrices of two shapes: each kind of tensor is described once.
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    examples: dict[tuple[str, tuple[int, ...]], LogicalTensor] = {}
    for tensor in layout:
        counts[tensor.component, tensor.shape] += 1
        examples[tensor.component, tensor.shape] = tensor
    return sum(counts[kind] * part.bytes for kind, t in examples.items() for part in stored(t, form, group_size))


def cut(
    layout: Sequence[LogicalTensor], form: Format, shard_bytes: int = SHARD_BYTES, group_size: int = INT4_GROUP
) -> list[Shard]:
    """Divide tensors, in order, into files of at most `shard_bytes`; a larger tensor has a file of its own."""
    files: list[list[LogicalTensor]] = [[]]
    room = shard_bytes
    for tensor in layout:
        size = weight_bytes([tensor], form, group_size)
        if size > room and files[-1]:
            files.append([])
            room = shard_bytes
        files[-1].append(tensor)
        room -= size
    return [
        Shard(name, tuple(tensors), tuple(part for t in tensors for part in stored(t, form, group_size)))
        for name, tensors in zip(file_names(len(files)), files, strict=True)
    ]


def file_names(count: int) -> list[str]:
    """The names of a checkpoint's files."""
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return names if count > 1 else ["model.safetensors"]


def index(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    total = sum(part.bytes for shard in shards for part in shard.stored)
    weight_map = {part.name: shard.file for shard in shards for part in shard.stored}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def header(tensors: Sequence[StoredTensor]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file and the position in the file of each tensor.

    Wider types come first, so that every tensor is aligned; the bytes are those of the safetensors library.
    """
    order = list(ITEM_BYTES)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    positions, end = {}, 0
    for tensor in sorted(tensors, key=lambda t: (order.index(t.dtype), t.name)):
        positions[tensor.name], begin = end, end
        end += tensor.bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in positions.items()}
