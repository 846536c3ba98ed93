"""Weights from host to host: every bucket is broadcast to all ranks, which take what they want.

While a bucket travels, the one before is taken and the next is packed. Each has a checksum that the version is part of.
"""

from collections import deque
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from k2.distributed import peers
from k2.distributed.matching import Copies, Schedule, Sources, by_key, copies, copy, damaged
from k2.distributed.pieces import Piece

SLOTS = 2
"""Buckets under way at once."""
SEGMENT = 8192
"""Words of 8 bytes that a checksum adds up at a time; a bucket's memory is a multiple of them."""


class Slot:
    """Memory of a bucket under way, and behind it its checksum."""

    def __init__(self, memory: Tensor, size: int) -> None:
        self.memory = memory[: padded(size)]
        words = self.memory.view(torch.int64)
        self._segments, self._checksum = words[:-1].view(-1, SEGMENT), words[-1:]
        self._places = torch.arange(1, 2 * len(self._segments), 2, device=memory.device)

    def seal(self, version: int) -> None:
        """Note the checksum of what is there."""
        torch.add(self._sum(), version, out=self._checksum)

    def sound(self, version: int) -> bool:
        """Whether it is what was sealed."""
        return torch.equal(self._sum() + version, self._checksum)

    def _sum(self) -> Tensor:
        """Of the segments' words, weighted by place, modulo 2^64."""
        return (self._segments.sum(1) * self._places).sum(0, keepdim=True)


def padded(size: int) -> int:
    """Bytes under way of a bucket of `size` bytes."""
    return (-(-size // (8 * SEGMENT)) * SEGMENT + 1) * 8


class Broadcast:
    """One way of weights; `sides` are this rank's targets, filled by turns."""

    def __init__(self, schedule: Schedule, sources: Sources, sides: list[list[Piece]], device: torch.device) -> None:
        self._schedule = schedule
        sizes = [bucket.size for _, bucket in schedule]
        memory = [torch.zeros(padded(max(sizes, default=0)), dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._slots = [Slot(memory[number % SLOTS], size) for number, size in enumerate(sizes)]
        self._pack = [self._packing(number, sources) for number in range(len(schedule))]
        self._take = [[self._taking(number, by_key(side)) for number in range(len(schedule))] for side in sides]

    def send(self, version: int, turn: int) -> str | None:
        """Bring all targets to what the weights are now; returns what went wrong on any rank."""
        take, under_way = self._take[turn % len(self._take)], deque[tuple[int, dist.Work]]()
        problems: list[str] = []
        for number in range(len(self._schedule)):
            under_way.append((number, self._depart(number, version)))
            if len(under_way) == SLOTS:
                problems += self._arrive(*under_way.popleft(), version, take)
        for number, work in under_way:
            problems += self._arrive(number, work, version, take)
        return peers.first_problem(next(iter(problems), None))

    def _depart(self, number: int, version: int) -> dist.Work:
        """Pack a bucket and send it off, or expect it."""
        owner, slot = self._schedule[number][0], self._slots[number]
        if owner == peers.rank():
            copy(*self._pack[number])
            slot.seal(version)
        work: dist.Work = dist.broadcast(slot.memory, src=owner, async_op=True)
        return work

    def _arrive(self, number: int, work: dist.Work, version: int, take: list[Copies]) -> list[str]:
        """Check a bucket and take from it; returns what is wrong with it."""
        work.wait()
        if not self._slots[number].sound(version):
            return [damaged(number, version)]
        copy(*take[number])
        return []

    def _packing(self, number: int, sources: Sources) -> Copies:
        owner, bucket = self._schedule[number]
        if owner != peers.rank():
            return [], []
        places = (replace(piece, tensor=view) for piece, view in bucket.views(self._slots[number].memory))
        return copies(((piece, sources.rows(piece)) for piece in bucket.pieces), by_key(places))

    def _taking(self, number: int, wanted: dict[str, list[Piece]]) -> Copies:
        return copies(self._schedule[number][1].views(self._slots[number].memory), wanted)
