"""What a task is: an agent, a user with goals, a world to start from, and the rubric that decides success."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from k2.agentic.tools import ToolSpec

TASKS_FILE = "tasks.jsonl"
HELDOUT_FILE = "heldout_tasks.jsonl"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Call(_Value):
    """One tool call of a reference solution; `effect` is what the record then holds, for checking lost answers."""

    tool: str
    arguments: dict[str, Any]
    effect: dict[str, Any] = {}


class Goal(_Value):
    """One thing the user wants. `calls` is a reference solution, known to the planner and never to the judge.

    `answers` are values the reply must state, found in the last result under `answer_key` when that is JSON. `parallel`
    calls do not depend on each other. A request that leaves something out names it in `missing`; the user says `detail`
    when asked.
    """

    request: str
    question: bool
    calls: tuple[Call, ...]
    answers: tuple[str, ...] = ()
    answer_key: str = ""
    parallel: bool = False
    missing: str = ""
    detail: str = ""


class Checkpoint(_Value):
    """Something that must have happened before the first call of `before`: a question, or a call of one of `tools`."""

    before: str
    event: Literal["question", "call"]
    tools: tuple[str, ...] = ()


class Rubric(_Value):
    """Machine-checkable success.

    `changes` maps paths of the final state to expected values (None: absent); `keeps` must be as they were, and nothing
    else may exist. Of each alternative in `required` at least one tool must have answered without error; `forbidden`
    tools must not be called. `answers` must be stated to the user.
    """

    changes: dict[str, Any] = {}
    keeps: dict[str, Any] = {}
    required: tuple[tuple[str, ...], ...] = ()
    forbidden: tuple[str, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    answers: tuple[str, ...] = ()
    max_calls: int = 8


class Agent(_Value):
    """A system prompt and the tools it may use."""

    system: str
    tools: tuple[ToolSpec, ...]


class Persona(_Value):
    """Who the user plays: how they write, and what they like."""

    name: str
    style: Literal["plain", "polite", "terse", "chatty"]


class Task(_Value):
    """One task. `world` is `evolved:<domain>` or `mcp:<server>`; `initial` is the state that world starts from."""

    id: str
    world: str
    difficulty: int
    agent: Agent
    persona: Persona
    goals: tuple[Goal, ...]
    initial: dict[str, Any]
    rubric: Rubric


def flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted path; an empty dict is a leaf."""
    if not isinstance(state, dict) or not state:
        return {prefix: state} if prefix else {}
    leaves: dict[str, Any] = {}
    for key in sorted(state):
        leaves |= flatten(state[key], f"{prefix}.{key}" if prefix else key)
    return leaves


def expected_changes(initial: Any, final: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rubric's `changes` and `keeps` when `initial` should become `final`."""
    before, after = flatten(initial), flatten(final)
    changes = {path: after.get(path) for path in sorted({*before, *after}) if before.get(path) != after.get(path)}
    return changes, {path: value for path, value in before.items() if path not in changes}


def write(path: Path, tasks: Iterable[Task]) -> None:
    """Save tasks as JSON lines."""
    path.write_text("".join(task.model_dump_json() + "\n" for task in tasks))


def read(path: Path) -> Iterator[Task]:
    """Tasks saved by `write`, in order."""
    with path.open() as lines:
        yield from map(Task.model_validate_json, lines)


def heldout(directory: Path) -> list[Task]:
    """Tasks of a synthesize artifact whose servers and domains no training trajectory has seen."""
    return list(read(directory / HELDOUT_FILE))
