"""Several corpora in given proportions of tokens, in an order that depends on no number of ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from k2.data.ledger import Span
from k2.data.loader import Batch, TokenLoader


class Mixture:
    """Batches whose rows come from several corpora, each as often as its weight says.

    Every row goes to the corpus that is furthest behind its share, so that proportions hold after any number of rows;
    all rows of a step have one length, so that rows are tokens. The state is that of the corpora and how many rows each
    has given; `read` names the rows of the last batch by corpus.

    Raises:
        ValueError: a weight is not positive, names differ, or the ranks do not divide the batch.
    """

    def __init__(
        self, corpora: Mapping[str, TokenLoader], weights: Mapping[str, float], batch_size: int,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        if corpora.keys() != weights.keys() or min(weights.values()) <= 0:
            raise ValueError(f"mixture: corpora {sorted(corpora)} need positive weights, got {dict(weights)}")
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {world_size}")
        self._corpora, self._weights = dict(sorted(corpora.items())), weights
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.given = dict.fromkeys(self._corpora, 0)
        self.read: dict[str, list[Span]] = {}

    def next_batch(self) -> Batch:
        """The rank's rows of the next step, those of one corpus together."""
        part, position, found = self._batch_size // self._world_size, 0, []
        low, high = self._rank * part, (self._rank + 1) * part
        for name, count in self._counts().items():
            first, last = max(low - position, 0), min(high - position, count)
            found.append(self._corpora[name].take(count, first, last))
            self.read[name] = self._corpora[name].read
            position += count
        return _together(found)

    def _counts(self) -> dict[str, int]:
        """Rows of the next step by corpus."""
        before, total = dict(self.given), sum(self._weights.values())
        for row in range(sum(before.values()) + 1, sum(before.values()) + self._batch_size + 1):
            behind = max(self.given, key=lambda name: (row * self._weights[name] / total - self.given[name], name))
            self.given[behind] += 1
        return {name: self.given[name] - before[name] for name in self.given}

    def set_context_length(self, context_length: int, batch_size: int) -> None:
        """Go on with rows of another length; proportions count from here."""
        self._batch_size = batch_size
        for corpus in self._corpora.values():
            if context_length != corpus.context_length:
                corpus.set_context_length(context_length, 0)
                self.given = dict.fromkeys(self._corpora, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture stands, JSON-ready; the same on every rank."""
        return {"given": self.given, "corpora": {name: corpus.state_dict() for name, corpus in self._corpora.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError when it belongs to other corpora."""
        if state["corpora"].keys() != self._corpora.keys():
            raise ValueError(f"mixture: state of {sorted(state['corpora'])} does not fit {sorted(self._corpora)}")
        self.given = dict(state["given"])
        for name, corpus in self._corpora.items():
            corpus.load_state_dict(state["corpora"][name])


def _together(parts: Sequence[Batch]) -> Batch:
    return Batch(
        tokens_BL=np.concatenate([part.tokens_BL for part in parts]),
        targets_BL=np.concatenate([part.targets_BL for part in parts]),
        document_BL=np.concatenate([part.document_BL for part in parts]),
        positions_BL=np.concatenate([part.positions_BL for part in parts]),
    )
