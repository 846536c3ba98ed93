"""The environment protocol that synthesis, reinforcement learning and evaluation share; torch-free.

A dialog environment, a single-turn mathematics problem and a tool simulator all look the same to a policy: they hand
out messages, and take assistant messages. An episode goes `reset`, then `step` until `done`:

    observation = environment.reset(task, seed)
    while not done:
        dialog += observation
        action = policy(dialog, environment.tools)       # one assistant message
        dialog += [action]
        observation, rewards, done = environment.step(action)

A single-turn task gives its prompt at `reset`, and rewards with `done=True` at the first `step`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
Snapshot = Mapping[str, Any]

TaskT_contra = TypeVar("TaskT_contra", contravariant=True)


class Step(NamedTuple):
    """What the environment answers to one action.

    `observation` holds the new messages (tool results, the user's next turn; none at the end), not the whole dialog.
    `rewards` are parts by name, each in [0, 1] unless its environment documents otherwise; empty until a verifier has
    something to say. How parts are weighted is the caller's choice.
    """

    observation: tuple[Message, ...]
    rewards: Mapping[str, float]
    done: bool


class Environment(Protocol[TaskT_contra]):
    """A gym-like task world. Deterministic: equal task, seed and actions give equal observations and rewards."""

    @property
    def tools(self) -> Sequence[Tool]:
        """OpenAI-style declarations of the tools of the current task; empty when it has none."""

    def reset(self, task: TaskT_contra, seed: int) -> tuple[Message, ...]:
        """Begin an episode and return its opening messages, system prompt included."""

    def step(self, action: Message) -> Step:
        """Take one assistant message. Malformed tool calls are answered with an error message, never raised."""

    def snapshot(self) -> Snapshot:
        """The episode so far as a JSON-ready value, cheap enough to take at every step (partial rollouts)."""

    def restore(self, task: TaskT_contra, snapshot: Snapshot) -> None:
        """Continue the episode of `task` that `snapshot` describes, in this or another process."""
