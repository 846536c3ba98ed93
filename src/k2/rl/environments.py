"""Verifiable tasks as single-turn environments, so that RL trains on the very class that evaluation measures."""

from collections.abc import Sequence

from k2.agentic.environment import Message, Snapshot, Step, Tool
from k2.evaluation.tasks import Example, assistant_text, get_task


class TaskEnvironment:
    """One problem, one assistant message, one verdict. Implements `k2.agentic.environment.Environment[Example]`."""

    def __init__(self) -> None:
        self._example: Example | None = None

    @property
    def tools(self) -> Sequence[Tool]:
        """Tools of the current problem."""
        return self._current.tools

    @property
    def _current(self) -> Example:
        if self._example is None:
            raise ValueError("call reset before step")
        return self._example

    def reset(self, task: Example, seed: int = 0) -> tuple[Message, ...]:
        """The problem's messages. A drawn problem has nothing random left, so the seed changes nothing."""
        self._example = task
        return tuple(task.messages)

    def step(self, action: Message) -> Step:
        """Score the answer; the episode is over."""
        example = self._current
        return Step((), {"verifier": get_task(example.task).score(example, assistant_text(action))}, done=True)

    def snapshot(self) -> Snapshot:
        """Nothing happens before the only step, so nothing needs to be kept."""
        return {}

    def restore(self, task: Example, snapshot: Snapshot) -> None:
        """Return to the problem."""
        self._example = task
