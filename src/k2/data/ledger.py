"""Proof of one pass: which rows were read, by whichever ranks, and that none was read twice or left out.

A row is named by its corpus, the window in it (counted through epochs), the phase in that (a change of the context
length cuts what is left anew) and its place in the order of that phase. Rows hold different tokens, and together all of
a window but what is too short for a row, which opens the next; so rows that are read once are documents that are read
once, and windows in sequence are all the documents there are.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any, Self

from k2.errors import StageError


@dataclass(frozen=True, order=True)
class Span:
    """Rows `start` to `stop` of the `rows` in a phase, in its order; all of none for a window too short for a row."""

    corpus: str
    window: int
    phase: int
    start: int
    stop: int
    rows: int

    def __str__(self) -> str:
        return f"rows {self.start} to {self.stop} of {self.corpus} window {self.window}, phase {self.phase}"

    @property
    def place(self) -> tuple[str, int, int]:
        """Corpus, window and phase."""
        return self.corpus, self.window, self.phase


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
        for corpus, spans in groupby(self.spans, attrgetter("corpus")):
            before = Span(corpus, -1, 0, 0, 0, 0)
            for span in spans:
                start = before.stop if span.place == before.place else 0
                if span.start > start:
                    raise _left_out(replace(span, start=start, stop=span.start))
                if span.window > before.window and before.stop < before.rows:
                    raise _left_out(replace(before, start=before.stop, stop=before.rows))
                if span.window > before.window + 1:
                    raise StageError(f"data: {corpus} windows {before.window + 1} to {span.window} were left out")
                before = span

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return sum(span.stop - span.start for span in self.spans)

    def state_dict(self) -> list[list[Any]]:
        """JSON-ready."""
        return [list(astuple(span)) for span in self.spans]

    @classmethod
    def merged(cls, states: Iterable[Iterable[Iterable[Any]]]) -> Self:
        """The ledger of all ranks, from theirs.

        Raises:
            StageError: two of them read the same rows.
        """
        return cls(Span(*values) for state in states for values in state)


def _left_out(span: Span) -> StageError:
    return StageError(f"data: {span} were left out")
