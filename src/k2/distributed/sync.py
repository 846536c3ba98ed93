"""Weight synchronisation for RL: from training ranks into inference weights, laid out in any way on either side.

The checkpoint engine's scheme (Kimi K2 report, section 3.3): every owner packs its weights into buckets and broadcasts
them to all ranks, which take what they need; simpler than sending each rank its own, and faster for less waiting. While
a bucket is under way the one before is unpacked and the next is packed. Each carries the version and a checksum.
Within one process nothing travels, and weights are copied straight to where they are wanted.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from k2.distributed import peers
from k2.distributed.pieces import Bucket, Piece, buckets
from k2.errors import StageError

BUCKET_BYTES = 64 << 20
"""Bytes of a bucket, at most: enough to keep a link busy."""
SEGMENT = 8192
"""Words of 8 bytes that a checksum adds up at a time; a bucket's memory is a multiple of them."""
TRAILER = 16
"""Bytes behind a bucket: version and checksum."""
Copies = tuple[list[Tensor], list[Tensor]]
"""Where to, and from where."""


class WeightSync:
    """A connection from `sources` to `targets` of all ranks; all ranks make it, and `send`, together.

    Attributes:
        version: of the weights that the targets have; None before the first, and after one that failed.
        bytes: what one `send` brings to every rank.

    Args:
        sources: the weights that this rank owns; where several ranks have the same rows, the first one sends them.
        targets: what this rank's inference engine wants, any rows and columns.
        dtype: what matrices travel in between processes; None leaves them as they are. Vectors do not change.
        limit: bytes of a bucket.
    Raises:
        StageError: nobody sends something that a target wants.
    """

    def __init__(
        self, sources: Iterable[Piece], targets: Iterable[Piece], dtype: torch.dtype | None = None,
        limit: int = BUCKET_BYTES,
    ) -> None:  # fmt: skip
        self.version: int | None = None
        # In the order of memory, what lies together is copied together.
        sources = sorted(sources, key=lambda piece: piece.tensor.data_ptr())
        self._own: dict[str, list[Piece]] = defaultdict(list)
        for piece in sources:
            self._own[piece.key].append(piece)
        self._schedule = list(_in_turns(peers.from_all([_described(piece, dtype) for piece in sources]), limit))
        self.bytes = sum(bucket.size for _, bucket in self._schedule)
        self._alone = peers.size() == 1
        self._memory = [] if self._alone else self._buffers(sources[0].tensor.device if sources else None)
        self._pack = [self._packing(number) for number in range(len(self._memory))]
        self._unpack = self._unpacking(list(targets))

    @torch.no_grad()
    def send(self, version: int) -> None:
        """Bring every rank's targets to what the sources' weights are now.

        Raises:
            StageError: on all ranks, when a bucket came damaged to one of them; the targets are then unusable.
        """
        self.version, problem = None, None
        under_way: tuple[int, dist.Work] | None = None
        for number in range(len(self._schedule)):
            work = self._depart(number, version)
            if under_way is not None:
                problem = self._arrive(*under_way, version) or problem
            under_way = None if work is None else (number, work)
        if under_way is not None:
            problem = self._arrive(*under_way, version) or problem
        if (first := peers.first_problem(problem)) is not None:
            raise StageError(f"weight synchronisation: {first}")
        self.version = version

    def _depart(self, number: int, version: int) -> dist.Work | None:
        """Pack a bucket and send it off."""
        if self._alone:
            _copy(*self._unpack[number])
            return None
        owner, memory = self._schedule[number][0], self._memory[number]
        if owner == peers.rank():
            _copy(*self._pack[number])
            memory[-TRAILER:].view(torch.int64).copy_(_trailer(memory, version))
        work: dist.Work = dist.broadcast(memory, src=owner, async_op=True)
        return work

    def _arrive(self, number: int, work: dist.Work, version: int) -> str | None:
        """Check a bucket and take from it; returns what is wrong with it."""
        work.wait()
        memory = self._memory[number]
        if not torch.equal(memory[-TRAILER:].view(torch.int64), _trailer(memory, version)):
            return f"bucket {number} of version {version} came damaged to rank {peers.rank()}"
        _copy(*self._unpack[number])
        return None

    def _buffers(self, device: torch.device | None) -> list[Tensor]:
        """Memory of every bucket and its trailer; two that are used in turn."""
        sizes = [_padded(bucket.size) + TRAILER for _, bucket in self._schedule]
        both = [torch.zeros(max(sizes, default=0), dtype=torch.uint8, device=device) for _ in range(2)]
        return [both[number % 2][:size] for number, size in enumerate(sizes)]

    def _packing(self, number: int) -> Copies:
        owner, bucket = self._schedule[number]
        if owner != peers.rank():
            return [], []
        return _joined((view, self._rows(piece)) for piece, view in bucket.views(self._memory[number]))

    def _rows(self, piece: Piece) -> Tensor:
        """This rank's memory of a piece that it described."""
        own = next(own for own in self._own[piece.key] if own.start <= piece.start < own.stop)
        return own.rows(piece.start, piece.stop).tensor

    def _arrived(self, number: int) -> Iterator[tuple[Piece, Tensor]]:
        """The pieces of a bucket, and where their values are when it is there."""
        bucket = self._schedule[number][1]
        if self._alone:
            return ((piece, self._rows(piece)) for piece in bucket.pieces)
        return bucket.views(self._memory[number])

    def _unpacking(self, targets: Sequence[Piece]) -> list[Copies]:
        wanted: dict[str, list[Piece]] = defaultdict(list)
        missing = {id(target): len(target.tensor) for target in targets}
        for target in targets:
            wanted[target.key].append(target)
        found = [_joined(_taking(self._arrived(i), wanted, missing)) for i in range(len(self._schedule))]
        lacking = next((f"nobody sends all of {target.key}" for target in targets if missing[id(target)]), None)
        if (problem := peers.first_problem(lacking)) is not None:
            raise StageError(f"weight synchronisation: {problem}")
        return found


def _taking(
    arrived: Iterable[tuple[Piece, Tensor]], wanted: Mapping[str, Sequence[Piece]], missing: dict[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What targets take of some pieces, and from where; `missing` counts the rows that they still need."""
    for piece, values in arrived:
        for target in wanted.get(piece.key, ()):
            low, high = max(piece.start, target.start), min(piece.stop, target.stop)
            if low < high:
                missing[id(target)] -= high - low
                rows = values[low - piece.start : high - piece.start]
                yield target.rows(low, high).tensor, rows if target.columns is None else rows[:, target.columns]


def _described(piece: Piece, dtype: torch.dtype | None) -> Piece:
    """The piece without its values, in the type that it travels in."""
    kind = dtype if dtype is not None and len(piece.shape) > 1 else piece.tensor.dtype
    return Piece(piece.key, torch.empty(piece.tensor.shape, dtype=kind, device="meta"), piece.shape, piece.start)


def _in_turns(described: Sequence[Sequence[Piece]], limit: int) -> Iterator[tuple[int, Bucket]]:
    """Every owner's buckets, a bucket of each in turn: while one sends, the next packs."""
    seen: set[tuple[str, int]] = set()
    lists: list[list[tuple[int, Bucket]]] = []
    for rank, pieces in enumerate(described):
        fresh = [piece for piece in pieces if (piece.key, piece.start) not in seen]
        seen |= {(piece.key, piece.start) for piece in fresh}
        lists.append([(rank, bucket) for bucket in buckets(fresh, limit)])
    return (turn for turn in chain.from_iterable(zip_longest(*lists)) if turn is not None)


def _joined(copies: Iterable[tuple[Tensor, Tensor]]) -> Copies:
    """The same copies, those together that are neighbours in memory on both sides."""
    found: list[tuple[Tensor, Tensor]] = []
    for place, values in copies:
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


def _copy(into: list[Tensor], source: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, source, non_blocking=True)


def _padded(size: int) -> int:
    return -(-size // (8 * SEGMENT)) * 8 * SEGMENT


def _trailer(memory: Tensor, version: int) -> Tensor:
    """Version and checksum: sums of the segments' words, weighted by place, modulo 2^64."""
    sums = memory[:-TRAILER].view(torch.int64).view(-1, SEGMENT).sum(1)
    places = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    return torch.stack([sums.new_tensor(version), (sums * places).sum()])
