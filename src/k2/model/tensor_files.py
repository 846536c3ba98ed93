"""Safetensors files read and written one tensor at a time, so that memory holds no more than one.

Files are read with ordinary reads, not mapped: mapped pages count as the process's memory, and a mapped file that is
truncated meanwhile kills the process instead of raising an error.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2.errors import UserError
from k2.model.storage import INDEX, ITEM_BYTES, StoredTensor, header

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_CHECKED_VALUES = 2**24  # looked at together, so that looking takes no memory of the tensor's size


@dataclass(frozen=True)
class Location(StoredTensor):
    """A stored tensor and where its bytes begin."""

    file: Path
    begin: int


def write_file(path: Path, stored: Sequence[StoredTensor], values: Iterable[Tensor]) -> None:
    """Write a safetensors file; `values` come in the order of `stored`. It is on disk when this returns."""
    head, positions = header(stored)
    with path.open("wb") as file:
        file.write(head)
        for part, value in zip(stored, values, strict=True):
            assert (value.dtype, tuple(value.shape)) == (DTYPES[part.dtype], part.shape), part.name
            file.seek(positions[part.name])
            file.write(value.detach().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_header(path: Path) -> dict[str, Location]:
    """The tensors of a safetensors file by name; their values are not read.

    Raises UserError when the file is truncated or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, max(size - 8, 0)):
            raise UserError(f"{path}: not a complete safetensors file: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _location(path, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file: its header cannot be read ({error})") from error
    expected = max((t.begin + t.bytes for t in tensors.values()), default=8 + length)
    if expected != 8 + length + sum(t.bytes for t in tensors.values()):
        raise UserError(f"{path}: not a safetensors file: its tensors overlap or leave gaps")
    if size != expected:
        raise UserError(f"{path}: not a complete safetensors file: expected {expected} bytes, found {size}")
    return tensors


def _location(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Location:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in ITEM_BYTES:
        raise UserError(f"{path}: tensor {name}: type is {entry['dtype']}, allowed are {', '.join(ITEM_BYTES)}")
    tensor = Location(name, entry["dtype"], tuple(entry["shape"]), path, start + begin)
    if min(begin, *tensor.shape, 0) < 0 or end - begin != tensor.bytes:
        raise UserError(f"{path}: tensor {name}: {list(tensor.shape)} takes {tensor.bytes} bytes, found {end - begin}")
    return tensor


class CheckpointTensors(Mapping[str, Tensor]):
    """Tensors of a folder of safetensors files by name, each read when asked for.

    With an index only the files it names belong to the checkpoint; without one all do.
    """

    def __init__(self, directory: Path) -> None:
        """Raises UserError when there are no weights, a file is missing, truncated or not safetensors."""
        self.stored: dict[str, Location] = {}
        weight_map = _weight_map(directory)
        files = sorted(set(weight_map.values())) or sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory}: no .safetensors file there")
        for file in files:
            self._add(directory / file)
        for name, file in sorted(weight_map.items()):
            if name not in self.stored or self.stored[name].file.name != file:
                raise UserError(f"tensor {name}: {INDEX} says it is in {directory / file}, it is not")

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {INDEX} names it")
        found = read_header(path)
        twice = sorted(found.keys() & self.stored.keys())
        if twice:
            raise UserError(f"tensor {twice[0]}: both in {self.stored[twice[0]].file} and in {path}")
        self.stored |= found

    def __getitem__(self, name: str) -> Tensor:
        """Raises UserError when a value is not finite, or the file was changed meanwhile."""
        place = self.stored[name]
        buffer = torch.empty(place.bytes, dtype=torch.uint8)
        with place.file.open("rb") as file:
            file.seek(place.begin)
            count = file.readinto(buffer.numpy().data)
        if count != place.bytes:
            raise UserError(f"{place.file}: tensor {name}: expected {place.bytes} bytes, found {count}")
        _check_finite(buffer, place)
        return buffer.view(DTYPES[place.dtype]).view(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.stored))

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({place.file for place in self.stored.values()})


def _weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX
    if not path.is_file():
        return {}
    try:
        weight_map = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an index of safetensors files ({error})") from error
    outside = sorted(file for file in weight_map.values() if Path(file).name != file)
    if outside:
        raise UserError(f"{path}: names {outside[0]}, which is outside its folder")
    return weight_map


def _check_finite(buffer: Tensor, place: Location) -> None:
    dtype = DTYPES[place.dtype]
    if not dtype.is_floating_point:
        return
    values = buffer if dtype is torch.float8_e4m3fn else buffer.view(dtype)
    starts = range(0, values.numel(), _CHECKED_VALUES)
    count = sum(int(_not_finite(values[start : start + _CHECKED_VALUES]).sum()) for start in starts)
    if count:
        raise UserError(f"tensor {place.name}: expected finite values, found {count} NaN or infinite in {place.file}")


def _not_finite(values: Tensor) -> Tensor:
    if values.dtype == torch.uint8:  # e4m3, which has no infinity and one magnitude for NaN
        return (values & 0x7F) == 0x7F
    return values.isfinite().logical_not_()
