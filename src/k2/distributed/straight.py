"""Weights within a host: who owns them writes them straight into the memory of who wants them, which is shared.

One copy, and nobody waits for room. After each bucket its owner adds up what it wrote, while that is in the cache; who
wants it adds up what is there, while the next one is written. Within one process there is nobody to check.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k2.distributed import peers
from k2.distributed.matching import Copies, Schedule, Sources, by_key, copies, copy, damaged
from k2.distributed.pieces import Piece, bytes_of, nbytes, storages_of, values
from k2.distributed.shared import Board, opened, share

ENTERED, WRITTEN, LEFT, SPOILED, SUMS = 0, 1, 2, 3, 5
"""Lines of the board, a number for each rank: attempts begun; buckets written; attempts ended; whether one was spoiled,
by turns with the line behind; and for every bucket the checksum of what its owner wrote for the rank."""
Range = tuple[int, int, int]
"""Part of a rank's memory: which storage, first byte, bytes."""


@dataclass(frozen=True)
class Target:
    """What somebody wants, without its values, and where these lie: which storage, and the first byte in it."""

    piece: Piece
    storage: int
    offset: int

    def within(self, memory: Sequence[Tensor]) -> Piece:
        """The target itself, given the bytes of all storages."""
        meta = self.piece.tensor
        return replace(self.piece, tensor=values(memory[self.storage], self.offset, meta.dtype, tuple(meta.shape)))


@dataclass(frozen=True)
class Delivery:
    """What a bucket's owner writes for one rank, for each of its sides."""

    rank: int
    copies: list[Copies]
    ranges: list[list[Range]]
    words: list[list[Tensor]]


@dataclass(frozen=True)
class Check:
    """What of one bucket arrives at this rank."""

    number: int
    owner: int
    words: list[Tensor]


class Straight:
    """One way of weights; `sides` are this rank's targets, filled by turns."""

    def __init__(self, schedule: Schedule, sources: Sources, sides: list[list[Piece]]) -> None:
        self._schedule, self._attempts = schedule, 0
        self._board = Board(SUMS + len(schedule)) if peers.size() > 1 else None
        storages = storages_of(piece.tensor for side in sides for piece in side)
        handles = [share(storage) for storage in storages] if self._board else []
        numbers = {storage._cdata: number for number, storage in enumerate(storages)}
        own = [bytes_of(storage) for storage in storages]
        everyone = peers.from_all((handles, [[_target(piece, numbers) for piece in side] for side in sides]))
        self._deliveries: dict[int, list[Delivery]] = {n: [] for n, (o, _) in enumerate(schedule) if o == peers.rank()}
        for rank, (theirs, targets) in enumerate(everyone):
            memory = own if rank == peers.rank() else [opened(handle) for handle in theirs]
            wanted = [by_key(target.within(memory) for target in side) for side in targets]
            for number, found in self._deliveries.items():
                arrived = [(piece, sources.rows(piece)) for piece in schedule[number][1].pieces]
                found += _deliveries(rank, [copies(arrived, side) for side in wanted], memory)
        self._checks = self._expected(own, len(sides))

    def send(self, version: int, turn: int) -> str | None:
        """Bring all targets to what the weights are now; returns what went wrong on any rank.

        Raises:
            StageError: a rank is dead.
        """
        if self._board is None:
            for delivery in (delivery for found in self._deliveries.values() for delivery in found):
                copy(*delivery.copies[turn % len(delivery.copies)])
            return None
        problems = self._exchange(self._board, version, turn)
        return self._end(self._board, problems)

    def _exchange(self, board: Board, version: int, turn: int) -> list[str]:
        """Write what this rank owns, and check what others write; returns what is wrong with it."""
        checks, problems = deque(self._checks[turn % len(self._checks)]), list[str]()
        board.numbers[ENTERED, peers.rank()] = self._attempts + 1
        board.wait(lambda: bool(board.numbers[ENTERED].min() > self._attempts))
        for number in self._deliveries:
            self._write(board, number, version, turn)
            while checks and self._written(board, checks[0]):
                problems += _wrong(board, checks.popleft(), version)
        while checks:
            board.wait(lambda: self._written(board, checks[0]))
            problems += _wrong(board, checks.popleft(), version)
        return problems

    def _write(self, board: Board, number: int, version: int, turn: int) -> None:
        for delivery in self._deliveries[number]:
            side = turn % len(delivery.copies)
            copy(*delivery.copies[side])
            if delivery.rank != peers.rank():
                board.numbers[SUMS + number, delivery.rank] = checksum(delivery.words[side], version)
        board.numbers[WRITTEN, peers.rank()] = self._count(number)

    def _written(self, board: Board, check: Check) -> bool:
        return bool(board.numbers[WRITTEN, check.owner] >= self._count(check.number))

    def _count(self, number: int) -> int:
        """Of buckets up to this one, over all attempts."""
        return self._attempts * len(self._schedule) + number + 1

    def _end(self, board: Board, problems: list[str]) -> str | None:
        """Wait for all; the next attempt's verdicts do not overwrite what others still read of this one."""
        verdicts = board.numbers[SPOILED + self._attempts % 2]
        verdicts[peers.rank()] = bool(problems)
        self._attempts += 1
        board.numbers[LEFT, peers.rank()] = self._attempts
        board.wait(lambda: bool(board.numbers[LEFT].min() >= self._attempts))
        return peers.first_problem(next(iter(problems), None)) if verdicts.any() else None

    def _expected(self, memory: Sequence[Tensor], sides: int) -> list[list[Check]]:
        """What others said that they write here, for each side in the order of the schedule."""
        said = {(number, each.rank): each.ranges for number, found in self._deliveries.items() for each in found}
        arriving: dict[int, list[list[Range]]] = {}
        for owner, ranges in enumerate(peers.from_all(said)):
            arriving |= {number: found for (number, rank), found in ranges.items() if rank == peers.rank() != owner}
        return [
            [Check(n, self._schedule[n][0], _words(memory, arriving[n][side])) for n in sorted(arriving)]
            for side in range(sides)
        ]


def checksum(words: Iterable[Tensor], version: int) -> int:
    """Sums of words, weighted by which range they are in, and the version, modulo 2^64 as a signed number."""
    total = version + sum((2 * number + 1) * int(part.sum()) for number, part in enumerate(words))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def _wrong(board: Board, check: Check, version: int) -> list[str]:
    """What is wrong with what arrived."""
    sound = board.numbers[SUMS + check.number, peers.rank()] == checksum(check.words, version)
    return [] if sound else [damaged(check.number, version)]


def _target(piece: Piece, numbers: Mapping[int, int]) -> Target:
    tensor = piece.tensor
    offset = int(tensor.storage_offset()) * tensor.element_size()
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return Target(replace(piece, tensor=meta), numbers[tensor.untyped_storage()._cdata], offset)


def _deliveries(rank: int, sides: list[Copies], memory: Sequence[Tensor]) -> list[Delivery]:
    """One, if the rank wants anything; what it writes for itself nobody checks."""
    if not any(into for into, _ in sides):
        return []
    if rank == peers.rank():
        return [Delivery(rank, sides, [], [])]
    numbers = {part.untyped_storage()._cdata: number for number, part in enumerate(memory)}
    ranges = [[_range(tensor, numbers) for tensor in into] for into, _ in sides]
    return [Delivery(rank, sides, ranges, [_words(memory, side) for side in ranges])]


def _range(tensor: Tensor, numbers: Mapping[int, int]) -> Range:
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return numbers[tensor.untyped_storage()._cdata], offset, nbytes(tensor)


def _words(memory: Sequence[Tensor], ranges: Iterable[Range]) -> list[Tensor]:
    """Ranges as words of 8 bytes, or as bytes where they are no whole words."""
    parts = ((memory[number][first : first + size], first % 8 or size % 8) for number, first, size in ranges)
    return [part if rest else part.view(torch.int64) for part, rest in parts]
