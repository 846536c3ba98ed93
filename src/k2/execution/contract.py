"""What a stage receives and returns; torch-free, imported by every stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from k2.store.artifacts import Artifact


class Progress(Protocol):
    """Where a stage says how far it is. Calls are cheap: output is rate-limited behind it."""

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        """Report that `done` of `total` `unit`s are finished, with current values (loss, lr, ...)."""

    def event(self, kind: str, **values: Any) -> None:
        """Record one event for the run's log and report, such as a clipped head or a rejected chunk."""


@dataclass(frozen=True)
class StageResult:
    """What `run` returns: the published artifact, whose statistics are the metrics of `summary.json`."""

    artifact: Artifact

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the stage said about its result when it published it; a cache hit says the same."""
        return self.artifact.statistics
