"""Batches of packed rows for training, and a state of a few numbers from which they continue exactly.

B batch (rows), L context length. A corpus comes in windows, such as the shards of a tokenized artifact. The order
depends on the seed alone: an epoch shuffles the windows; a window's documents are shuffled, concatenated and cut into
rows, and the rows are shuffled. What is too short for a row at the end of a window (or of a context-length phase)
opens the next. Every rank keeps the same state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from k2.data.ledger import Span
from k2.data.packing import Int64, Stream

IGNORE = -100
_WINDOWS = 1 << 31
"""Third word of the seed of the order of windows; rows have the number of their phase there."""


@dataclass(frozen=True)
class Batch:
    """One rank's rows. Targets are the next token of the same document, IGNORE after its last one.

    `document_BL` numbers the documents of a row from 0; attention may be masked to equal numbers.
    """

    tokens_BL: Int64
    targets_BL: Int64
    document_BL: Int64


class Corpus(Protocol):
    """Documents in windows; tokens are numbered through all of them.

    windows, tokens, documents: how many there are. name: what a ledger calls it.
    """

    name: str
    windows: int
    tokens: int
    documents: int

    def offsets(self, window: int) -> Int64:
        """Where the documents of a window start, and where the last one ends."""

    def read(self, index: Int64) -> NDArray[Any]:
        """The tokens of these numbers."""

    def is_last(self, index: Int64) -> NDArray[np.bool_]:
        """Whether a document ends with the token of each number."""


class ArrayCorpus:
    """A corpus in memory, as one window."""

    def __init__(self, tokens: NDArray[np.unsignedinteger], offsets: Int64, name: str = "") -> None:
        self.name, self.windows, self.tokens, self.documents = name, 1, len(tokens), len(offsets) - 1
        self._tokens, self._offsets = tokens, np.asarray(offsets)

    def offsets(self, window: int) -> Int64:
        """Where the documents start, and where the last one ends."""
        return self._offsets

    def read(self, index: Int64) -> NDArray[Any]:
        """The tokens of these numbers."""
        return self._tokens[index].astype(np.int64)

    def is_last(self, index: Int64) -> NDArray[np.bool_]:
        """Whether a document ends with the token of each number."""
        ends = self._offsets[np.searchsorted(self._offsets, index, side="right")]
        return np.asarray(index + 1 == ends)


class TokenLoader:
    """Endless seeded batches over a tokenized corpus.

    `batch_size` is the number of rows of the whole step; rank r of `world_size` gets the r-th equal part,
    so a run may resume with another world size and see the same steps. `read` are the rows of the last batch.
    Raises ValueError for an empty corpus or a batch size that the ranks do not divide.
    """

    def __init__(
        self, corpus: Corpus, batch_size: int, context_length: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {world_size}")
        if corpus.tokens == 0:
            raise ValueError("the corpus holds no tokens")
        self._corpus, self._seed = corpus, seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.read: list[Span] = []
        self._start_window(0, Stream.of(np.empty(0, np.int64), np.empty(0, np.int64)), context_length)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last row came from, from 0."""
        return self._window // self._corpus.windows

    @property
    def context_length(self) -> int:
        """Tokens per row, L."""
        return int(self._phases[-1][0])

    def next_batch(self) -> Batch:
        """The rank's rows of the next step."""
        part = self._batch_size // self._world_size
        return self.take(self._batch_size, self._rank * part, (self._rank + 1) * part)

    def take(self, count: int, low: int, high: int) -> Batch:
        """Go on by `count` rows, and return those from `low` to `high` of them; `read` says which they are."""
        found, self.read, position = [np.empty((0, self.context_length), np.int64)], [], 0
        for span in self._take(count):
            first, last = max(low - position, 0), min(high - position, span.stop - span.start)
            if first < last or span.rows == 0:
                mine = replace(span, start=span.start + first, stop=span.start + last) if span.rows else span
                self.read.append(mine)
                found.append(self._index(mine))
            position += span.stop - span.start
        return self._batch(np.concatenate(found))

    def set_context_length(self, context_length: int, batch_size: int) -> None:
        """Go on with rows of another length: what is left of the window is cut and shuffled anew."""
        if batch_size % self._world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {self._world_size}")
        self._batch_size = batch_size
        if context_length != self.context_length:
            self._recut(context_length)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, JSON-ready; the same on every rank."""
        lengths = np.diff(self._carry.ends, prepend=0)
        return {
            "corpus": self._identity,
            "window": self._window,
            "carry": [self._carry.starts.tolist(), lengths.tolist()],
            "phases": [list(phase) for phase in self._phases],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError when it belongs to another corpus or seed."""
        if state["corpus"] != self._identity:
            raise ValueError(f"loader state of {state['corpus']} does not fit {self._identity}")
        starts, lengths = (np.asarray(values, dtype=np.int64) for values in state["carry"])
        (first_length, first_rows), *later = state["phases"]
        self._start_window(state["window"], Stream.of(starts, lengths), first_length)
        self._phases[-1][1] = first_rows
        for context_length, rows in later:
            self._recut(context_length)
            self._phases[-1][1] = rows

    @property
    def _identity(self) -> dict[str, Any]:
        """What a state must belong to."""
        corpus = self._corpus
        sizes = {"tokens": corpus.tokens, "documents": corpus.documents, "windows": corpus.windows}
        return {"name": corpus.name, "seed": self._seed, **sizes}

    def _start_window(self, window: int, carry: Stream, context_length: int) -> None:
        """Shuffle a window's documents behind what the one before left over; windows are counted through epochs."""
        epoch, place = divmod(window, self._corpus.windows)
        turns = np.random.default_rng([self._seed, epoch, _WINDOWS]).permutation(self._corpus.windows)
        offsets = self._corpus.offsets(int(turns[place]))
        order = np.random.default_rng([self._seed, window]).permutation(len(offsets) - 1)
        self._window, self._carry = window, carry
        self._phases: list[list[int]] = []
        self._cut(carry.then(Stream.of(offsets[order], np.diff(offsets)[order])), context_length)

    def _cut(self, stream: Stream, context_length: int) -> None:
        """Cut the stream into rows and shuffle them; a phase is [context length, rows taken]."""
        self._phases.append([context_length, 0])
        key = [self._seed, self._window, len(self._phases)]
        self._stream, self._rows = stream, np.random.default_rng(key).permutation(len(stream) // context_length)

    def _recut(self, context_length: int) -> None:
        self._cut(self._remaining(), context_length)

    def _remaining(self) -> Stream:
        """The tokens that no row has taken yet, in stream order."""
        length, taken = self._phases[-1]
        rows = np.append(np.sort(self._rows[taken:]), len(self._stream) // length)
        return self._stream.slices(rows[rows * length < len(self._stream)] * length, length)

    def _take(self, count: int) -> Iterator[Span]:
        """The next `count` rows, across windows; each part must be looked at before the next.

        A window too short for a row is noted too, by an empty part.
        """
        while count:
            length, taken = self._phases[-1]
            rows = self._rows[taken : taken + count]
            if len(rows) or len(self._rows) == 0:
                self._phases[-1][1] += len(rows)
                count -= len(rows)
                yield Span(
                    self._corpus.name, self._window, len(self._phases), taken, taken + len(rows), len(self._rows)
                )
            if len(rows) == 0:
                self._start_window(self._window + 1, self._remaining(), length)

    def _index(self, span: Span) -> Int64:
        """Token indices [rows, L] of rows of the present phase."""
        length = self.context_length
        return self._stream.locate(self._rows[span.start : span.stop, None] * length + np.arange(length))

    def _batch(self, index_BL: Int64) -> Batch:
        """Every token is read once: the one behind it is its neighbour's in the row, but where a slice ends."""
        is_last_BL = self._corpus.is_last(index_BL)
        cut_BL = np.ones(index_BL.shape, dtype=bool)
        cut_BL[:, :-1] = index_BL[:, 1:] != index_BL[:, :-1] + 1
        elsewhere_BL = cut_BL & ~is_last_BL
        behind = index_BL[elsewhere_BL] + 1
        tokens = self._corpus.read(np.concatenate([index_BL.ravel(), behind]))
        tokens_BL = tokens[: index_BL.size].reshape(index_BL.shape)
        targets_BL = np.roll(tokens_BL, -1, axis=1)
        targets_BL[elsewhere_BL] = tokens[index_BL.size :]
        targets_BL[is_last_BL] = IGNORE
        starts_BL = np.zeros(index_BL.shape, dtype=np.int64)
        starts_BL[:, 1:] = (cut_BL | is_last_BL)[:, :-1]
        return Batch(tokens_BL, targets_BL, document_BL=starts_BL.cumsum(axis=1))
