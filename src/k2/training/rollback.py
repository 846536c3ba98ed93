"""After a loss spike: back to the last checkpoint, and past the batch that made it.

What is left out is part of the checkpoint, so that a run killed anywhere in between ends in the same bytes.
"""

from typing import Any

from k2.errors import StageError
from k2.execution.contract import Progress
from k2.training.state import Saver, Source, TrainState

LEFT_OUT = "left_out"
"""Note of a run: how many batches are passed over before a step."""


def leave_out(state: TrainState, source: Source[Any]) -> None:
    """Pass over the batches with which the next step spiked."""
    for _ in range(state.notes.get(LEFT_OUT, {}).get(str(state.step + 1), 0)):
        source.next_step()


def roll_back(state: TrainState, source: Source[Any], checkpoints: Saver, progress: Progress) -> None:
    """Take back the steps since the last checkpoint. Without one only the spike's update is left out.

    Raises:
        StageError: this step spiked too often, with another batch each time.
    """
    step, left_out = state.step, dict(state.notes.get(LEFT_OUT, {}))
    left_out[str(step)] = left_out.get(str(step), 0) + 1
    limit = state.optimizer.config.max_skipped_steps
    if left_out[str(step)] > limit:
        raise StageError(f"step {step}: {limit} batches were left out after rollbacks, and the loss spikes again")
    checkpoints.wait()
    if checkpoints.restore(state, source):
        state.notes[LEFT_OUT] = left_out
        progress.event("rollback", step=step, to=state.step, batches=left_out[str(step)])
