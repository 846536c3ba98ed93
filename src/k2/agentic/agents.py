"""Agents and their tasks in synthetic domains: a system prompt, a subset of tools, a user, goals, and the rubric."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from k2.agentic.domains import Domain, initial_state, tools_of
from k2.agentic.goals import BUILDERS, apply, semantics
from k2.agentic.operations import State
from k2.agentic.tasks import Agent, Checkpoint, Goal, Persona, Rubric, Task, expected_changes
from k2.agentic.tools import ToolSpec

STYLES = ("plain", "polite", "terse", "chatty")
NAMES = ("Ada", "Ben", "Cem", "Dia", "Eli", "Fay", "Gus", "Ida")
ROLES = ("You run {0}.", "You are the {0} desk.", "You help with {0}.", "You manage {0}.")
RULES = ("Ask when something is missing.", "Try again after an error.", "Never guess.", "Do only what is asked.")


@dataclass(frozen=True)
class TaskShape:
    """How large tasks are: tools an agent has, records in the world, goals a user has, and the hardest level.

    Level 1 is one call with everything said; level 2 needs a question or a value read first; level 3 has follow-ups.
    `terse` keeps system prompts to one short sentence.
    """

    min_tools: int
    max_tools: int
    records: int
    max_goals: int
    max_difficulty: int
    terse: bool = False


def persona(rng: random.Random) -> Persona:
    """A random user."""
    return Persona.model_validate({"name": rng.choice(NAMES), "style": rng.choice(STYLES)})


def system_prompt(subject: str, shape: TaskShape, rng: random.Random) -> str:
    """A short role and up to two rules."""
    rules = rng.sample(RULES, 0 if shape.terse else rng.randint(0, 2))
    return " ".join([rng.choice(ROLES).format(subject), *rules])


def domain_task(domain: Domain, shape: TaskShape, task_id: str, rng: random.Random) -> Task:
    """A random task in a domain whose reference solution is known to succeed."""
    while True:
        difficulty = rng.randint(1, shape.max_difficulty)
        tools = _tool_subset(domain, shape, difficulty, rng)
        initial = initial_state(domain, shape.records, rng)
        count = rng.randint(2, max(2, shape.max_goals)) if difficulty > 2 else 1
        made = _goals(tools, initial, count, difficulty, rng)
        if made is not None:
            break
    goals, final = made
    return Task(
        id=task_id,
        world=f"evolved:{domain.name}",
        difficulty=difficulty,
        agent=Agent(system=system_prompt(domain.name, shape, rng), tools=tuple(tools)),
        persona=persona(rng),
        goals=goals,
        initial=initial,
        rubric=_rubric(tools, goals, initial, final),
    )


def _tool_subset(domain: Domain, shape: TaskShape, difficulty: int, rng: random.Random) -> list[ToolSpec]:
    tools = tools_of(domain)
    count = min(len(tools), rng.randint(max(shape.min_tools, min(2, difficulty)), max(2, shape.max_tools)))
    chosen = rng.sample(tools, min(count, shape.max_tools))
    if difficulty > 1 and shape.max_tools > 1:
        kinds = ("get", "adjust")
        chosen = [rng.choice([t for t in tools if semantics(t).kind == kind]) for kind in kinds] + chosen[2:]
    return sorted({tool.name: tool for tool in chosen}.values(), key=lambda tool: tool.name)


def _goals(
    tools: Sequence[ToolSpec], initial: State, count: int, difficulty: int, rng: random.Random
) -> tuple[tuple[Goal, ...], State] | None:
    state, goals = initial, list[Goal]()
    for index in range(count):
        level = 2 if difficulty == 2 or (difficulty > 2 and index % 2) else 1
        goal = rng.choice(BUILDERS[level])(tools, state, rng)
        if goal is None:
            return None
        goals.append(goal)
        state = apply(goal, tools, state)
    return tuple(goals), state


def _rubric(tools: Sequence[ToolSpec], goals: Sequence[Goal], initial: State, final: State) -> Rubric:
    changes, keeps = expected_changes(initial, final)
    readers = tuple(tool.name for tool in tools if semantics(tool).reads_only)
    used = {call.tool for goal in goals for call in goal.calls}
    needs_reading = any(call.tool in readers for goal in goals for call in goal.calls)
    forbidden = [t.name for t in tools if semantics(t).kind in ("remove", "create") and t.name not in used]
    return Rubric(
        changes=changes,
        keeps=keeps,
        required=(readers,) if needs_reading else (),
        forbidden=tuple(forbidden),
        checkpoints=tuple(_checkpoints(goals, readers)),
        answers=tuple(answer for goal in goals for answer in goal.answers),
        max_calls=2 * sum(len(goal.calls) for goal in goals) + 3,
    )


def _checkpoints(goals: Sequence[Goal], readers: tuple[str, ...]) -> list[Checkpoint]:
    """Order that matters: ask before acting on an unclear request, read before acting on a value.

    Only for tools that a single goal uses, so that the first call of the tool is that goal's.
    """
    uses = [call.tool for goal in goals for call in goal.calls]
    made = []
    for goal in goals:
        last = goal.calls[-1].tool
        if uses.count(last) > 1 or last in readers:
            continue
        if goal.missing:
            made.append(Checkpoint(before=last, event="question"))
        elif len(goal.calls) > 1:
            made.append(Checkpoint(before=last, event="call", tools=readers))
    return made
