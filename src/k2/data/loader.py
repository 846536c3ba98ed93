"""Batches of packed rows for training, and a state of a few numbers from which they continue exactly.

B batch (rows), L context length. The order of an epoch depends on the seed and the epoch alone: documents
are shuffled, concatenated and cut into rows, and the rows are shuffled. What is too short for a row at the
end of an epoch (or of a context-length phase) opens the next. Every rank keeps the same state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2.data.ledger import Span
from k2.data.packing import Int64, Stream

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One rank's rows. Targets are the next token of the same document, IGNORE after its last one.

    `document_BL` numbers the documents of a row from 0 (attention may be masked to equal numbers), and
    `positions_BL` counts from 0 in each.
    """

    tokens_BL: Int64
    targets_BL: Int64
    document_BL: Int64
    positions_BL: Int64


class TokenLoader:
    """Endless seeded batches over a tokenized corpus.

    `batch_size` is the number of rows of the whole step; rank r of `world_size` gets the r-th equal part,
    so a run may resume with another world size and see the same steps. `read` are the rows of the last batch.
    Raises ValueError for an empty corpus or a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        offsets: Int64,
        batch_size: int,
        context_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {world_size}")
        if len(tokens) == 0:
            raise ValueError("the corpus holds no tokens")
        self._tokens, self._offsets, self._seed = tokens, np.asarray(offsets), seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.read: list[Span] = []
        self._start_epoch(0, Stream.of(np.empty(0, np.int64), np.empty(0, np.int64)), context_length)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last row came from, from 0."""
        return self._epoch

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
            if first < last:
                mine = replace(span, start=span.start + first, stop=span.start + last)
                self.read.append(mine)
                found.append(self._index(mine))
            position += span.stop - span.start
        return self._batch(np.concatenate(found))

    def set_context_length(self, context_length: int, batch_size: int) -> None:
        """Go on with rows of another length: what is left of the epoch is cut and shuffled anew."""
        if batch_size % self._world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {self._world_size}")
        self._batch_size = batch_size
        if context_length != self.context_length:
            self._recut(context_length)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, JSON-ready; the same on every rank."""
        lengths = np.diff(self._carry.ends, prepend=0)
        return {
            "corpus": [len(self._tokens), len(self._offsets) - 1, self._seed],
            "epoch": self._epoch,
            "carry": [self._carry.starts.tolist(), lengths.tolist()],
            "phases": [list(phase) for phase in self._phases],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError when it belongs to another corpus or seed."""
        corpus = [len(self._tokens), len(self._offsets) - 1, self._seed]
        if state["corpus"] != corpus:
            raise ValueError(f"loader state of [tokens, documents, seed] {state['corpus']} does not fit {corpus}")
        starts, lengths = (np.asarray(values, dtype=np.int64) for values in state["carry"])
        (first_length, first_rows), *later = state["phases"]
        self._start_epoch(state["epoch"], Stream.of(starts, lengths), first_length)
        self._phases[-1][1] = first_rows
        for context_length, rows in later:
            self._recut(context_length)
            self._phases[-1][1] = rows

    def _start_epoch(self, epoch: int, carry: Stream, context_length: int) -> None:
        """Shuffle the documents behind what the last epoch left over."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._offsets) - 1)
        self._epoch, self._carry = epoch, carry
        self._phases: list[list[int]] = []
        self._cut(carry.then(Stream.of(self._offsets[order], np.diff(self._offsets)[order])), context_length)

    def _cut(self, stream: Stream, context_length: int) -> None:
        """Cut the stream into rows and shuffle them; a phase is [context length, rows taken]."""
        self._phases.append([context_length, 0])
        key = [self._seed, self._epoch, len(self._phases)]
        self._stream, self._rows = stream, np.random.default_rng(key).permutation(len(stream) // context_length)

    def _recut(self, context_length: int) -> None:
        self._cut(self._remaining(), context_length)

    def _remaining(self) -> Stream:
        """The tokens that no row has taken yet, in stream order."""
        length, taken = self._phases[-1]
        rows = np.append(np.sort(self._rows[taken:]), len(self._stream) // length)
        return self._stream.slices(rows[rows * length < len(self._stream)] * length, length)

    def _take(self, count: int) -> Iterator[Span]:
        """The next `count` rows, across epochs; each part must be looked at before the next."""
        while count:
            length, taken = self._phases[-1]
            rows = self._rows[taken : taken + count]
            if len(rows) == 0:
                self._start_epoch(self._epoch + 1, self._remaining(), length)
                continue
            self._phases[-1][1] += len(rows)
            count -= len(rows)
            yield Span(self._epoch, len(self._phases), taken, taken + len(rows), len(self._rows))

    def _index(self, span: Span) -> Int64:
        """Token indices [rows, L] of rows of the present phase."""
        length = self.context_length
        return self._stream.locate(self._rows[span.start : span.stop, None] * length + np.arange(length))

    def _batch(self, index_BL: Int64) -> Batch:
        document_BL = np.searchsorted(self._offsets, index_BL, side="right") - 1
        is_last_BL = index_BL + 1 == self._offsets[document_BL + 1]
        next_BL = np.minimum(index_BL + 1, len(self._tokens) - 1)
        starts_BL = np.ones(index_BL.shape, dtype=bool)
        starts_BL[:, 1:] = is_last_BL[:, :-1] | (np.diff(index_BL) != 1)
        column_L = np.arange(index_BL.shape[1])
        return Batch(
            tokens_BL=self._tokens[index_BL].astype(np.int64),
            targets_BL=np.where(is_last_BL, IGNORE, self._tokens[next_BL].astype(np.int64)),
            document_BL=np.cumsum(starts_BL, axis=1) - 1,
            positions_BL=column_L - np.maximum.accumulate(np.where(starts_BL, column_L, 0), axis=1),
        )
