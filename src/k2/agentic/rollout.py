"""Run many episodes at once: whoever acts sees all open dialogs of a round, so that a model can answer in one batch."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from k2.agentic.dialog import DialogEnvironment
from k2.agentic.environment import Message, Step
from k2.agentic.planner import Acts, Mistake, Planner
from k2.agentic.tasks import Task
from k2.generation.protocol import Completion, GenerationRequest
from k2.generation.protocol import Generator as TextGenerator
from k2.serving.tool_calls import parse_assistant


@dataclass
class Episode:
    """One dialog in progress; `scores` are the judge's once it is done."""

    task: Task
    seed: int
    environment: DialogEnvironment
    observation: tuple[Message, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    done: bool = False

    @property
    def passed(self) -> bool:
        """Whether the judge accepted it."""
        return self.scores.get("passed") == 1.0

    def advance(self, action: Message) -> None:
        """Take one assistant message."""
        step: Step = self.environment.step(action)
        self.observation, self.scores, self.done = step


class Policy(Protocol):
    """Whoever acts."""

    def act(self, episodes: Sequence[Episode]) -> list[Message]:
        """The next assistant message of each dialog."""


def rollout(
    tasks: Sequence[Task], policy: Policy, make_environment: Callable[[], DialogEnvironment], seed: int
) -> list[Episode]:
    """Play every task to its end, in lock-step."""
    episodes = []
    for task in tasks:
        environment = make_environment()
        episodes.append(Episode(task, seed, environment, environment.reset(task, seed)))
    while active := [episode for episode in episodes if not episode.done]:
        for episode, action in zip(active, policy.act(active), strict=True):
            episode.advance(action)
    return episodes


class PlannerPolicy:
    """The reference planner in every dialog; `mistakes` is the hidden truth about the mistakes it made, by task id."""

    def __init__(self, mistake_rate: float, recovery_rate: float) -> None:
        self._rates = (mistake_rate, recovery_rate)
        self._planners: dict[str, Planner] = {}
        self._acts: dict[str, Acts] = {}

    @property
    def mistakes(self) -> dict[str, list[Mistake]]:
        """What went wrong on purpose."""
        return {task_id: planner.mistakes for task_id, planner in self._planners.items()}

    def act(self, episodes: Sequence[Episode]) -> list[Message]:
        """See Policy."""
        return [self._next(episode) for episode in episodes]

    def _next(self, episode: Episode) -> Message:
        task = episode.task
        if task.id in self._acts:
            return _resume(self._acts[task.id], episode.observation)
        planner = Planner(task, f"{episode.seed}/{task.id}", *self._rates)
        self._planners[task.id], self._acts[task.id] = planner, planner.episode()
        return next(self._acts[task.id])


class ModelPolicy:
    """A language model in every dialog, one batch a round."""

    def __init__(self, generator: TextGenerator, temperature: float, max_tokens: int) -> None:
        self._generator = generator
        self._temperature = temperature
        self._max_tokens = max_tokens

    def act(self, episodes: Sequence[Episode]) -> list[Message]:
        """See Policy."""
        requests = [
            GenerationRequest(
                messages=list(episode.environment.messages),
                tools=episode.environment.tools,
                max_tokens=self._max_tokens,
                temperature=self._temperature,
                seed=episode.seed * 1_000_003 + len(episode.environment.messages),
            )
            for episode in episodes
        ]
        completions = self._generator.generate(requests)
        return [assistant_message(r.messages, c) for r, c in zip(requests, completions, strict=True)]


def assistant_message(history: Sequence[Message], completion: Completion) -> Message:
    """A completion as the next message of a dialog, its calls numbered on from those of `history`.

    A completion that failed says nothing: its text is the reason, not the model's words.
    """
    content, parsed = parse_assistant("" if completion.finish_reason == "error" else completion.text)
    calls: Sequence[Mapping[str, Any]] = completion.tool_calls or parsed
    first = sum(len(message.get("tool_calls") or ()) for message in history)
    numbered = [
        {**call, "id": f"functions.{call['function']['name']}:{first + index}"} for index, call in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content}
    return {**message, "tool_calls": numbered} if numbered else message


def _resume(acts: Generator[Message, Sequence[Message], str], observation: Sequence[Message]) -> Message:
    """The planner's next message; when it has nothing left to do, it says so."""
    try:
        return acts.send(observation)
    except StopIteration:
        return {"role": "assistant", "content": "Is there anything else?"}
