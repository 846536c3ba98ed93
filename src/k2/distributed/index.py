"""The index of a sharded checkpoint: which rows of which tensor lie where in which object. Torch-free.

    {"objects": [SHA-256, ...], "tensors": {key: [dtype, shape, [[start, stop, object, offset], ...]]}}

Every rank makes the index of what it wrote; rank 0 merges them. A tensor several ranks hold is listed once.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from k2.errors import StageError


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a tensor, at `offset` in the object with that digest."""

    start: int
    stop: int
    digest: str
    offset: int


class Index:
    """Where every tensor's rows lie."""

    def __init__(self) -> None:
        self._objects: dict[str, int] = {}
        self._tensors: dict[str, tuple[str, tuple[int, ...], dict[int, Part]]] = {}

    def add(self, key: str, dtype: str, shape: tuple[int, ...], part: Part) -> None:
        """Note a part. Who comes first is listed where replicas wrote the same rows."""
        parts = self._tensors.setdefault(key, (dtype, shape, {}))[2]
        if part.start not in parts:
            parts[part.start] = part
            self._objects.setdefault(part.digest, len(self._objects))

    def digests(self) -> set[str]:
        """Of all objects."""
        return set(self._objects)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def parts(self, key: str, shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[str, Part]]:
        """The parts that hold rows `start` to `stop` of a tensor, each with its type; complete, without overlap.

        Raises:
            StageError: the tensor or some of its rows are not there, or it has another shape.
        """
        dtype, found, parts = self._tensors.get(key, ("", shape, {}))
        if found != shape:
            raise StageError(f"the checkpoint's {key} has the shape {list(found)}, not {list(shape)}")
        position = start
        for first in sorted(parts):
            part = parts[first]
            if first <= position < part.stop and position < stop:
                yield dtype, part
                position = part.stop
        if position < stop:
            raise StageError(f"the checkpoint has no rows {position} to {stop} of {key}")

    def document(self) -> dict[str, Any]:
        """As JSON."""
        tensors = {
            key: [dtype, list(shape), [[p.start, p.stop, self._objects[p.digest], p.offset] for p in parts.values()]]
            for key, (dtype, shape, parts) in self._tensors.items()
        }
        return {"objects": list(self._objects), "tensors": tensors}

    @classmethod
    def merged(cls, documents: Iterable[Mapping[str, Any]]) -> "Index":
        """The index of all that some indexes list."""
        index = cls()
        for document in documents:
            objects = document["objects"]
            for key, (dtype, shape, parts) in document["tensors"].items():
                for start, stop, number, offset in parts:
                    index.add(key, dtype, tuple(shape), Part(start, stop, objects[number], offset))
        return index
