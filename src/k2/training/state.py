"""What a training run carries from step to step, and where its data comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.training.history import History


class MicroBatch(Protocol):
    """What fits through the model at once; one step accumulates several."""

    @property
    def tokens(self) -> int:
        """Tokens the model reads, for the schedule and the counters."""


_SCALARS = ("step", "tokens", "skipped", "mean_loss", "notes")

BatchT = TypeVar("BatchT", bound=MicroBatch)
BatchT_co = TypeVar("BatchT_co", bound=MicroBatch, covariant=True)
BatchT_contra = TypeVar("BatchT_contra", bound=MicroBatch, contravariant=True)


class Source(Protocol[BatchT_co]):
    """Endless steps of micro-batches with a resumable position."""

    def next_step(self) -> Sequence[BatchT_co]:
        """This rank's micro-batches of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step, JSON-ready."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""


class Saver(Protocol):
    """Keeps checkpoints of a run; `k2.distributed.checkpoint.Checkpoints` does."""

    def step(self, state: "TrainState", source: Source[Any]) -> bool:
        """Save if it is time to; returns whether it was."""

    def save(self, state: "TrainState", source: Source[Any]) -> None:
        """Save now, and return when it is committed."""

    def restore(self, state: "TrainState", source: Source[Any]) -> bool:
        """Bring state and source to the newest intact checkpoint; False when there is none."""

    def wait(self) -> None:
        """Return when what was begun last is saved."""


@dataclass
class TrainState:
    """Everything that a step changes; with the source's position and the RNG, what a checkpoint holds.

    skipped: updates skipped in a row.
    mean_loss: running mean of the loss, None before the first good step.
    notes: JSON-ready results that a stage wants to find again after it was killed.
    """

    model: Transformer
    optimizer: MuonClip
    history: History = field(default_factory=History)
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    mean_loss: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """What is no tensor, JSON-ready."""
        return {name: getattr(self, name) for name in _SCALARS} | {"history": vars(self.history)}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Take over what `values` gave."""
        for name in _SCALARS:
            setattr(self, name, values[name])
        self.history = History(**values["history"])
