"""Weight synchronisation for RL: from training ranks into inference weights, laid out in any way on either side.

The checkpoint engine's scheme (Kimi K2 report, section 3.3): every owner packs its weights into buckets that go to all
ranks, which take what they need; simpler than sending each rank its own, and faster for less waiting. While a bucket is
packed, others travel and are taken. The ranks of a host take them from memory that they share, between hosts they are
broadcast (`k2.distributed.ring`). Each carries the version and a checksum, computed while it lies in the cache.
Within one process nothing travels, and weights are copied straight to where they are wanted.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from k2.distributed import peers
from k2.distributed.pieces import Bucket, Piece, buckets
from k2.distributed.ring import SLOTS, Ring, host_of
from k2.errors import StageError

LINK_BYTES, CACHE_BYTES = 64 << 20, 1 << 20
"""Bytes of a bucket, at most: enough to keep a link busy; on one host, few enough to stay in the cache."""
Copies = tuple[list[Tensor], list[Tensor]]
"""Where to, and from where."""


class WeightSync:
    """A connection from `sources` to `targets` of all ranks; all ranks make it, and `send`, together.

    Attributes:
        version: of the weights in use; None before the first, and after a failure of who has no `spare`.
        side: which weights are in use, those of `targets` (0) or of `spare` (1).
        bytes: what one `send` brings to every rank.

    Args:
        sources: the weights that this rank owns; where several ranks have the same rows, the first one sends them.
        targets: what this rank's inference engine wants, any rows and columns.
        spare: the same in other memory. The two are then filled by turns, and what is in use stays as it is until the
            next version is complete.
        dtype: what matrices travel in between processes; None leaves them as they are. Vectors do not change.
        limit: bytes of a bucket; by default what suits their way.
    Raises:
        StageError: nobody sends something that a target wants.
    """

    def __init__(
        self, sources: Iterable[Piece], targets: Iterable[Piece], spare: Iterable[Piece] = (), *,
        dtype: torch.dtype | None = None, limit: int | None = None,
    ) -> None:  # fmt: skip
        self.version: int | None = None
        # In the order of memory, what lies together is copied together.
        sources = sorted(sources, key=lambda piece: piece.tensor.data_ptr())
        sides = [list(targets), *([side] if (side := list(spare)) else [])]
        self._own: dict[str, list[Piece]] = defaultdict(list)
        for piece in sources:
            self._own[piece.key].append(piece)
        device = next((piece.tensor.device for piece in chain(sources, *sides)), torch.device("cpu"))
        hosts = peers.from_all(host_of(device))
        limit = limit or (CACHE_BYTES if len(set(hosts)) == 1 < len(hosts) else LINK_BYTES)
        self._schedule = list(_in_turns(peers.from_all([_described(piece, dtype) for piece in sources]), limit))
        self.bytes = sum(bucket.size for _, bucket in self._schedule)
        sizes = [bucket.size for _, bucket in self._schedule]
        self._ring = Ring(hosts, max(sizes, default=0), device) if len(hosts) > 1 else None
        self._slots = [self._ring.slot(number, size) for number, size in enumerate(sizes)] if self._ring else []
        self._pack = [self._packing(number) for number in range(len(self._schedule))]
        lacking: list[str] = []
        self._unpack = [self._unpacking(side, lacking) for side in sides]
        if (problem := peers.first_problem(next(iter(lacking), None))) is not None:
            raise StageError(f"weight synchronisation: {problem}")
        self.side = len(sides) - 1

    @torch.no_grad()
    def send(self, version: int) -> None:
        """Bring every rank's targets to what the sources' weights are now.

        Raises:
            StageError: a bucket came damaged to some rank, which all ranks then say, or a rank of this host died. What
                was sent is unusable; what is in use remains, where there is a spare.
            RuntimeError: a rank of another host died, with the same consequences.
        """
        side = (self.side + 1) % len(self._unpack)
        self.version = self.version if len(self._unpack) > 1 else None
        if self._ring is None:
            for copies in self._unpack[side]:
                _copy(*copies)
        else:
            self._travel(self._ring, version, side)
        self.version, self.side = version, side

    def _travel(self, ring: Ring, version: int, side: int) -> None:
        """Send all buckets through the ring."""
        problem = None
        under_way: deque[tuple[int, dist.Work | None]] = deque()
        for number in range(len(self._schedule)):
            under_way.append((number, self._depart(ring, number, version)))
            if len(under_way) == SLOTS:
                problem = self._arrive(ring, *under_way.popleft(), version, side) or problem
        for number, work in under_way:
            problem = self._arrive(ring, number, work, version, side) or problem
        if ring.end(len(self._schedule), problem is not None):
            raise StageError(f"weight synchronisation: {peers.first_problem(problem)}")

    def _depart(self, ring: Ring, number: int, version: int) -> dist.Work | None:
        """Pack a bucket, if it is this rank's, and send it to the other hosts or receive it from one."""
        owner, slot = self._schedule[number][0], self._slots[number]
        if not ring.writes(owner):
            return None
        ring.wait_free(number)
        if owner == peers.rank():
            _copy(*self._pack[number])
            slot.seal(version)
            ring.fill(number)
        return ring.broadcast(owner, slot.memory)

    def _arrive(self, ring: Ring, number: int, work: dist.Work | None, version: int, side: int) -> str | None:
        """Check a bucket and take from it, if this rank wants anything; returns what is wrong with it."""
        if work is not None:
            work.wait()
            ring.fill(number)
        ring.wait_filled(number)
        copies = self._unpack[side][number]
        sound = not copies[0] or self._slots[number].sound(version)
        if sound:
            _copy(*copies)
        ring.take(number)
        return None if sound else f"bucket {number} of version {version} came damaged to rank {peers.rank()}"

    def _packing(self, number: int) -> Copies:
        owner, bucket = self._schedule[number]
        if not self._slots or owner != peers.rank():
            return [], []
        return _joined((view, self._rows(piece)) for piece, view in bucket.views(self._slots[number].memory))

    def _rows(self, piece: Piece) -> Tensor:
        """This rank's memory of a piece that it described."""
        own = next(own for own in self._own[piece.key] if own.start <= piece.start < own.stop)
        return own.rows(piece.start, piece.stop).tensor

    def _arrived(self, number: int) -> Iterator[tuple[Piece, Tensor]]:
        """The pieces of a bucket, and where their values are when it is there."""
        bucket = self._schedule[number][1]
        if not self._slots:
            return ((piece, self._rows(piece)) for piece in bucket.pieces)
        return bucket.views(self._slots[number].memory)

    def _unpacking(self, targets: Sequence[Piece], lacking: list[str]) -> list[Copies]:
        """What to take from every bucket; notes what nobody sends."""
        wanted: dict[str, list[Piece]] = defaultdict(list)
        missing = {id(target): len(target.tensor) for target in targets}
        for target in targets:
            wanted[target.key].append(target)
        found = [_joined(_taking(self._arrived(i), wanted, missing)) for i in range(len(self._schedule))]
        lacking += [f"nobody sends all of {target.key}" for target in targets if missing[id(target)]]
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
