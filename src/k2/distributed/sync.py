"""Weight synchronisation for RL: from training ranks into inference weights, laid out in any way on either side.

The checkpoint engine's scheme (Kimi K2 report, section 3.3): every owner sends its weights bucket by bucket to all who
want some of them; simpler than an exchange between each two layouts, and faster for less waiting. Where they go decides
how: within a host straight into the memory of who wants them (`k2.distributed.straight`), else by broadcast to all
ranks (`k2.distributed.broadcast`).
"""

import logging
from collections.abc import Iterable
from itertools import chain

import torch

from k2.distributed import peers
from k2.distributed.broadcast import Broadcast
from k2.distributed.matching import Schedule, Sources, in_turns, lacking
from k2.distributed.pieces import Piece, storages_of
from k2.distributed.shared import ROOM, host_of, room
from k2.distributed.straight import Straight
from k2.errors import StageError

LINK_BYTES, CACHE_BYTES = 64 << 20, 1 << 20
"""Bytes of a bucket, at most: enough to keep a link busy; within a host, few enough to stay in the cache."""
_log = logging.getLogger(__name__)


class WeightSync:
    """A connection from `sources` to `targets` of all ranks; all ranks make it, and `send`, together.

    Attributes:
        version: of the weights in use; None before the first, and after a failure of who has no `spare`.
        bytes: what one `send` brings to who wants everything.

    Args:
        sources: the weights that this rank owns; where several ranks have the same rows, the first one sends them.
        targets: what this rank's inference engine wants, any rows and columns.
        spare: the same in other memory. The two are then filled by turns, and what is in use stays as it is until the
            next version is complete.
        dtype: what matrices are broadcast in; None leaves them as they are. Vectors do not change.
        limit: bytes of a bucket; by default what suits their way.
    Raises:
        StageError: nobody sends something that a target wants.
    """

    def __init__(
        self, sources: Iterable[Piece], targets: Iterable[Piece], spare: Iterable[Piece] = (), *,
        dtype: torch.dtype | None = None, limit: int | None = None,
    ) -> None:  # fmt: skip
        own = Sources(sources)
        sides = [list(targets), *([side] if (side := list(spare)) else [])]
        device = next((piece.tensor.device for piece in chain(own.pieces, *sides)), torch.device("cpu"))
        straight = _within_a_host(device, sides)
        limit = limit or (CACHE_BYTES if straight and peers.size() > 1 else LINK_BYTES)
        schedule: Schedule = list(in_turns(peers.from_all(own.described(dtype)), limit))
        if (problem := peers.first_problem(lacking(schedule, chain(*sides)))) is not None:
            raise StageError(f"weight synchronisation: {problem}")
        self._way = Straight(schedule, own, sides) if straight else Broadcast(schedule, own, sides, device)
        self.bytes = sum(bucket.size for _, bucket in schedule)
        self.version: int | None = None
        self._sides, self._sent = len(sides), 0

    @property
    def side(self) -> int:
        """Which weights are in use, those of `targets` (0) or of `spare` (1)."""
        return (self._sent - 1) % self._sides

    @torch.no_grad()
    def send(self, version: int) -> None:
        """Bring every rank's targets to what the sources' weights are now.

        Raises:
            StageError: something came damaged to some rank, which all ranks then say, or a rank of this host died. What
                was sent is unusable; what is in use remains, where there is a spare.
            RuntimeError: a rank of another host died, with the same consequences.
        """
        self.version = self.version if self._sides > 1 else None
        if (problem := self._way.send(version, self._sent)) is not None:
            raise StageError(f"weight synchronisation: {problem}")
        self.version, self._sent = version, self._sent + 1


def _within_a_host(device: torch.device, sides: list[list[Piece]]) -> bool:
    """Whether all ranks can write into each other's targets."""
    pieces = list(chain(*sides))
    whole = all(piece.tensor.is_contiguous() for piece in pieces)
    needed = sum(storage.nbytes() for storage in storages_of(piece.tensor for piece in pieces))
    told = peers.from_all((host_of(device), whole, needed, room()))
    if len({host for host, *_ in told}) > 1 or not all(whole for _, whole, *_ in told):
        return False
    total, free = sum(needed for *_, needed, _ in told), told[0][-1]
    if fits := len(told) == 1 or total <= free:
        return fits
    _log.warning("%s has %d bytes, weights of %d are broadcast between the processes of a host", ROOM, free, total)
    return fits
