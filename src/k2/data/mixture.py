"""Several corpora in given proportions of tokens, in an order that depends on no number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from k2.data.ledger import Span
from k2.data.loader import Batch, TokenLoader
from k2.data.packing import Int64


class Mixture:
    """Batches whose rows come from several corpora, each as often as its weight says.

    Every row goes to the corpus that is furthest behind its share, so that proportions hold after any number of rows;
    all rows of a step have one length, so that rows are tokens. The state is that of the corpora and how many rows each
    has given; `read` names the rows of the last batch.

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
        self.read: list[Span] = []

    def next_batch(self) -> Batch:
        """The rank's rows of the next step; every rank's are mixed."""
        part = self._batch_size // self._world_size
        low, high = self._rank * part, (self._rank + 1) * part
        givers = np.asarray([self._next_giver() for _ in range(self._batch_size)])
        found, rows, self.read = [], [], []
        for name, loader in self._corpora.items():
            places = np.flatnonzero(givers == name)
            first, last = np.searchsorted(places, (low, high)).tolist()
            found.append(loader.take(len(places), first, last))
            rows.append(places[first:last])
            self.read += loader.read
        return _in_order(found, np.argsort(np.concatenate(rows)))

    def _next_giver(self) -> str:
        """The corpus that the next row comes from."""
        row, total = sum(self.given.values()) + 1, sum(self._weights.values())
        name = max(self.given, key=lambda name: (row * self._weights[name] / total - self.given[name], name))
        self.given[name] += 1
        return name

    def set_context_length(self, context_length: int, batch_size: int) -> None:
        """Go on with rows of another length; proportions count from here."""
        self._batch_size = batch_size
        for corpus in self._corpora.values():
            if context_length != corpus.context_length:
                corpus.set_context_length(context_length, 0)
                self.given = dict.fromkeys(self._corpora, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture stands, JSON-ready; the same on every rank."""
        return {
            "given": dict(self.given),
            "corpora": {name: corpus.state_dict() for name, corpus in self._corpora.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError when it belongs to other corpora."""
        if state["corpora"].keys() != self._corpora.keys():
            raise ValueError(f"mixture: state of {sorted(state['corpora'])} does not fit {sorted(self._corpora)}")
        self.given = dict(state["given"])
        for name, corpus in self._corpora.items():
            corpus.load_state_dict(state["corpora"][name])


def _in_order(parts: Sequence[Batch], order: Int64) -> Batch:
    def rows(name: str) -> Int64:
        joined: Int64 = np.concatenate([getattr(part, name) for part in parts])
        return joined[order]

    return Batch(**{field.name: rows(field.name) for field in fields(Batch)})
