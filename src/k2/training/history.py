"""Curves of a run for its report, thinned while they grow and saved with the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

REDUCTIONS = {
    "step": "last",
    "tokens": "last",
    "lr": "last",
    "max_logits": "max",
    "clipped_heads": "sum",
    "gammas": "min",
    "expert_floor": "min",
    "spike": "sum",
    "skipped": "sum",
}
"""How the rows of one interval become one; whatever is not named is averaged."""


@dataclass
class History:
    """One row per `interval` steps.

    rows: finished rows, JSON-ready.
    pending: steps of the unfinished interval.
    """

    interval: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)
    pending: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one step's numbers and lists of numbers; every step has the same names."""
        self.pending.append(dict(row))
        if len(self.pending) == self.interval:
            self.finish()

    def finish(self) -> None:
        """Make a row of an interval that the end of the run cut short."""
        if self.pending:
            self.rows.append({name: self._reduce(name) for name in self.pending[0]})
            self.pending = []

    def curve(self, name: str) -> list[Any]:
        """One name's values over the rows; numbers that are not finite are None."""
        return [_finite(row[name]) for row in self.rows]

    def curves(self) -> dict[str, list[Any]]:
        """All curves."""
        return {name: self.curve(name) for name in (self.rows[0] if self.rows else {})}

    def _reduce(self, name: str) -> Any:
        values = np.asarray([row[name] for row in self.pending])
        how = REDUCTIONS.get(name, "mean")
        return (values[-1] if how == "last" else getattr(np, how)(values, axis=0)).tolist()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if np.isfinite(value) else None
