"""State by logical tensor: what a rank holds, packed into buckets. Checkpoints and weight synchronisation speak it.

A piece is some rows of one tensor's weight or optimizer state; its key names that state and the tensor as Hugging
Face does, so that who reads it may be laid out over other ranks in any other way.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor

from k2.model.hf import part
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.transformer import Transformer

ALIGNMENT = 16
"""Bytes that every piece of a bucket starts at a multiple of, so that it can be viewed in its own type."""
WEIGHT, MASTER = "weight", "master"


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor's state in this rank's memory.

    key: such as `momentum/model.layers.3.mlp.experts.7.up_proj.weight`.
    tensor: a view; its first axis is the rows `start`, `start + 1`, ... of the whole.
    shape: of the whole.
    columns: of the whole that it has, where an inference engine divides a matrix by them; None for all.
    """

    key: str
    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0
    columns: slice | None = None

    @property
    def stop(self) -> int:
        """The row behind the last."""
        return self.start + len(self.tensor)

    def rows(self, start: int, stop: int) -> "Piece":
        """The part of it that is the whole tensor's rows from `start` to `stop`."""
        return Piece(self.key, self.tensor[start - self.start : stop - self.start], self.shape, start, self.columns)


def pieces_of(
    states: Mapping[str, Tensor], layout: Iterable[LogicalTensor], shapes: Mapping[str, tuple[int, ...]], kind: str
) -> list[Piece]:
    """One kind of state of all tensors that have it.

    Args:
        states: of parameters, by name; those without it are left out.
        layout: the tensors in these parameters.
        shapes: of whole tensors, by name.
        kind: what the keys start with.
    """
    return [
        Piece(
            f"{kind}/{tensor.name}", part(states[tensor.parameter].detach(), tensor), shapes[tensor.name], tensor.start
        )
        for tensor in layout
        if tensor.parameter in states
    ]


def whole(key: str, tensor: Tensor) -> Piece:
    """A tensor that nobody divides."""
    return Piece(key, tensor.reshape(1) if tensor.dim() == 0 else tensor, tuple(tensor.shape) or (1,))


def weights(model: Transformer) -> list[Piece]:
    """The weights and selection biases of a whole model, or of some layers of it."""
    tensors = logical_tensors(model.config)
    return pieces_of(model.state_dict(), tensors, {tensor.name: tensor.shape for tensor in tensors}, WEIGHT)


def nbytes(tensor: Tensor) -> int:
    """Bytes of its values."""
    return tensor.numel() * tensor.element_size()


def storages_of(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each one once."""
    return list({tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values())


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A storage's bytes as a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass(frozen=True)
class Bucket:
    """Pieces that lie one behind the other in memory, at `offsets`, `size` bytes in all."""

    pieces: tuple[Piece, ...]
    offsets: tuple[int, ...]
    size: int

    def views(self, buffer: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece with its place in the bytes `buffer`, in the piece's own shape and type."""
        for piece, offset in zip(self.pieces, self.offsets, strict=True):
            yield piece, values(buffer, offset, piece.tensor.dtype, tuple(piece.tensor.shape))

    def pack(self, buffer: Tensor) -> None:
        """Copy all pieces into the bytes."""
        views = [view for _, view in self.views(buffer)]
        torch._foreach_copy_(views, [piece.tensor for piece in self.pieces], non_blocking=True)


def values(buffer: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies at some offset of bytes."""
    return buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)


def buckets(pieces: Iterable[Piece], limit: int) -> list[Bucket]:
    """Pack pieces in their order into as few bytes as alignment allows; a bucket is at most `limit` bytes long.

    Large pieces are cut between rows; only a single row may make a bucket longer.
    """
    found: list[Bucket] = []
    chosen: list[Piece] = []
    offsets: list[int] = []
    end = 0
    for piece in chain.from_iterable(_cut(piece, limit) for piece in pieces):
        offset, size = -(-end // ALIGNMENT) * ALIGNMENT, nbytes(piece.tensor)
        if chosen and offset + size > limit:
            found.append(Bucket(tuple(chosen), tuple(offsets), end))
            chosen, offsets, offset = [], [], 0
        chosen.append(piece)
        offsets.append(offset)
        end = offset + size
    return [*found, Bucket(tuple(chosen), tuple(offsets), end)] if chosen else found


def _cut(piece: Piece, limit: int) -> Iterator[Piece]:
    if 0 < nbytes(piece.tensor) <= limit:
        yield piece
        return
    rows = max(1, limit // max(1, nbytes(piece.tensor[:1])))
    for start in range(piece.start, piece.stop, rows):
        yield piece.rows(start, min(start + rows, piece.stop))
