"""Proof of one pass: which rows were read, by whichever ranks, and that none was read twice or left out.

A row is named by its epoch, the phase in it (a change of the context length cuts what is left anew) and its place in
the order of that phase. Rows hold different tokens, and together all of an epoch but what is too short for a row, which
opens the next; so rows that are read once are documents that are read once.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from k2.errors import StageError


@dataclass(frozen=True, order=True)
class Span:
    """Rows `start` to `stop` of the `rows` in a phase, in its order."""

    epoch: int
    phase: int
    start: int
    stop: int
    rows: int

    def __str__(self) -> str:
        return f"rows {self.start} to {self.stop} of epoch {self.epoch}, phase {self.phase}"

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and phase."""
        return self.epoch, self.phase


class Ledger:
    """What was read. It stays small: neighbouring spans become one."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self.spans: list[Span] = []
        self.add(spans)

    def add(self, spans: Iterable[Span]) -> None:
        """Note rows.

        Raises:
            StageError: some were read before.
        """
        for span in spans:
            insort(self.spans, span)
        joined: list[Span] = []
        for span in self.spans:
            last = joined[-1] if joined and joined[-1].place == span.place else None
            if last and last.stop > span.start:
                raise StageError(f"data: {span} were read twice")
            if last and last.stop == span.start:
                joined[-1] = replace(last, stop=span.stop)
            else:
                joined.append(span)
        self.spans = joined

    def check(self) -> None:
        """Prove that everything before the last row was read.

        Raises:
            StageError: rows were left out.
        """
        for span in self.spans:
            if span.start > 0:
                before = max(
                    (other.stop for other in self.spans if other.place == span.place and other < span), default=0
                )
                raise StageError(f"data: {replace(span, start=before, stop=span.start)} were left out")
        for span, then in pairwise(self.spans):
            if then.epoch > span.epoch and span.stop < span.rows:
                raise StageError(f"data: {replace(span, start=span.stop, stop=span.rows)} were left out")

    def state_dict(self) -> list[list[int]]:
        """JSON-ready."""
        return [[span.epoch, span.phase, span.start, span.stop, span.rows] for span in self.spans]

    @classmethod
    def merged(cls, states: Iterable[Iterable[Iterable[Any]]]) -> Self:
        """The ledger of all ranks, from theirs.

        Raises:
            StageError: two of them read the same rows.
        """
        return cls(Span(*values) for state in states for values in state)
