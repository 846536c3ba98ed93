"""Which rows of sources go to which rows of targets, in whatever way either side is laid out."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor

from k2.distributed import peers
from k2.distributed.pieces import Bucket, Piece, buckets

Copies = tuple[list[Tensor], list[Tensor]]
"""Where to, and from where."""
Schedule = Sequence[tuple[int, Bucket]]
"""Buckets in the order that they go in, each with the rank that owns what is in it; pieces are without values."""


class Sources:
    """The weights that this rank owns, in the order of memory: what lies together is copied together."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = sorted(pieces, key=lambda piece: piece.tensor.data_ptr())
        self._by_key = by_key(self.pieces)

    def described(self, dtype: torch.dtype | None) -> list[Piece]:
        """The pieces without their values, matrices in the type that they travel in."""
        return [_described(piece, dtype) for piece in self.pieces]

    def rows(self, piece: Piece) -> Tensor:
        """The values of a piece that was described, or of some of its rows."""
        own = next(own for own in self._by_key[piece.key] if own.start <= piece.start < own.stop)
        return own.rows(piece.start, piece.stop).tensor


def by_key(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """Pieces of every tensor."""
    found: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        found[piece.key].append(piece)
    return found


def in_turns(described: Sequence[Sequence[Piece]], limit: int) -> Iterator[tuple[int, Bucket]]:
    """Every owner's buckets, a bucket of each in turn; rows that several have are the first one's."""
    seen: set[tuple[str, int]] = set()
    lists: list[list[tuple[int, Bucket]]] = []
    for rank, pieces in enumerate(described):
        fresh = [piece for piece in pieces if (piece.key, piece.start) not in seen]
        seen |= {(piece.key, piece.start) for piece in fresh}
        lists.append([(rank, bucket) for bucket in buckets(fresh, limit)])
    return (turn for turn in chain.from_iterable(zip_longest(*lists)) if turn is not None)


def lacking(schedule: Schedule, targets: Iterable[Piece]) -> str | None:
    """The first target that nobody sends all rows of."""
    sent = by_key(piece for _, bucket in schedule for piece in bucket.pieces)
    for target in targets:
        rows = (min(piece.stop, target.stop) - max(piece.start, target.start) for piece in sent.get(target.key, ()))
        if sum(max(0, count) for count in rows) < len(target.tensor):
            return f"nobody sends all of {target.key}"
    return None


def copies(arrived: Iterable[tuple[Piece, Tensor]], wanted: Mapping[str, Sequence[Piece]]) -> Copies:
    """What targets, by key, take of some pieces with values; neighbours in memory on both sides are one copy."""
    return _joined(_taken(arrived, wanted))


def copy(into: list[Tensor], source: list[Tensor]) -> None:
    """Make them."""
    if into:
        torch._foreach_copy_(into, source, non_blocking=True)


def damaged(number: int, version: int) -> str:
    """What is said of a bucket that is not as it was sent."""
    return f"bucket {number} of version {version} came damaged to rank {peers.rank()}"


def _described(piece: Piece, dtype: torch.dtype | None) -> Piece:
    kind = dtype if dtype is not None and len(piece.shape) > 1 else piece.tensor.dtype
    return Piece(piece.key, torch.empty(piece.tensor.shape, dtype=kind, device="meta"), piece.shape, piece.start)


def _taken(
    arrived: Iterable[tuple[Piece, Tensor]], wanted: Mapping[str, Sequence[Piece]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for piece, values in arrived:
        for target in wanted.get(piece.key, ()):
            low, high = max(piece.start, target.start), min(piece.stop, target.stop)
            if low < high:
                rows = values[low - piece.start : high - piece.start]
                yield target.rows(low, high).tensor, rows if target.columns is None else rows[:, target.columns]


def _joined(pairs: Iterable[tuple[Tensor, Tensor]]) -> Copies:
    found: list[tuple[Tensor, Tensor]] = []
    for place, values in pairs:
        if found and _follows(found[-1][0], place) and _follows(found[-1][1], values):
            found[-1] = _longer(found[-1][0], place), _longer(found[-1][1], values)
        else:
            found.append((place, values))
    return [place for place, _ in found], [values for _, values in found]


def _follows(first: Tensor, then: Tensor) -> bool:
    together = first.is_contiguous() and then.is_contiguous() and first.dtype == then.dtype
    same = first.untyped_storage()._cdata == then.untyped_storage()._cdata
    return together and same and first.storage_offset() + first.numel() == then.storage_offset()


def _longer(first: Tensor, then: Tensor) -> Tensor:
    return first.as_strided((first.numel() + then.numel(),), (1,), first.storage_offset())
