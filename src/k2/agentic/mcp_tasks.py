"""Tasks for the real MCP servers: what users want of a repository and of a clock, with predictable outcomes."""

import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any
from zoneinfo import ZoneInfo

from k2.agentic.agents import TaskShape, persona, system_prompt
from k2.agentic.mcp_worlds import DAY, STABLE_ZONES, VOLATILE_TOOLS
from k2.agentic.tasks import Agent, Call, Goal, Rubric, Task, expected_changes
from k2.agentic.tools import ToolSpec

REPOSITORIES = ("shop", "docs", "site", "game", "core", "blog")
FILES = ("readme.txt", "ports.txt", "notes.txt", "limits.txt", "prices.txt")
KEYS = ("port", "limit", "price", "size", "speed")
BRANCHES = ("fix", "dev", "next", "test", "ui", "beta")
SUBJECTS = ("start", "add prices", "fix typo", "new limits", "clean up", "update notes")

State = dict[str, Any]
GitGoal = Callable[[str, State, Mapping[str, Any], random.Random], tuple[Goal, State] | None]


def mcp_task(server: str, tools: Sequence[ToolSpec], shape: TaskShape, task_id: str, rng: random.Random) -> Task:
    """A random task on one server; `tools` are those it lists."""
    return (_git_task if server == "git" else _time_task)(tools, shape, task_id, rng)


def _time_task(tools: Sequence[ToolSpec], shape: TaskShape, task_id: str, rng: random.Random) -> Task:
    count = rng.randint(1, shape.max_goals) if shape.max_difficulty > 2 else 1
    return _task("time", tools, shape, tuple(_convert(rng) for _ in range(count)), ({}, {}), task_id, rng)


def _convert(rng: random.Random) -> Goal:
    source, target = rng.sample(STABLE_ZONES, 2)
    moment = DAY.replace(hour=rng.randrange(24), minute=rng.choice((0, 15, 30, 45)), tzinfo=ZoneInfo(source))
    time = moment.strftime("%H:%M")
    return Goal(
        request=f"what time is {time} {source} in {target}",
        question=True,
        calls=(
            Call(
                tool="convert_time",
                arguments={"source_timezone": source, "time": time, "target_timezone": target},
            ),
        ),
        answers=(moment.astimezone(ZoneInfo(target)).strftime("%H:%M"),),
    )


def _git_task(tools: Sequence[ToolSpec], shape: TaskShape, task_id: str, rng: random.Random) -> Task:
    recipe = _recipe(rng)
    state: State = {
        "head": "main",
        "branches": dict.fromkeys(("main", *recipe["branches"]), recipe["commits"][-1]["subject"]),
        "changes": dict.fromkeys(recipe["changed"], " M"),
    }
    initial, goals = state, list[Goal]()
    count = rng.randint(1, shape.max_goals) if shape.max_difficulty > 2 else 1
    while len(goals) < count:
        made = rng.choice(GIT_GOALS)(recipe["repository"], state, recipe, rng)
        if made is not None:
            goals.append(made[0])
            state = made[1]
    task = _task("git", tools, shape, tuple(goals), (initial, state), task_id, rng)
    return task.model_copy(update={"initial": recipe})


def _task(
    server: str,
    tools: Sequence[ToolSpec],
    shape: TaskShape,
    goals: tuple[Goal, ...],
    states: tuple[State, State],
    task_id: str,
    rng: random.Random,
) -> Task:
    """A task from its goals and the states before and after; the agent gets the tools it needs and some others."""
    used = {call.tool for goal in goals for call in goal.calls}
    others = [tool.name for tool in tools if tool.name not in used | VOLATILE_TOOLS]
    spare = max(0, min(len(others), shape.max_tools - len(used)))
    chosen = used | set(rng.sample(others, rng.randint(0, spare)))
    changes, keeps = expected_changes(*states)
    return Task(
        id=task_id,
        world=f"mcp:{server}",
        difficulty=min(3, len(goals) + 1),
        agent=Agent(
            system=system_prompt(server, shape, rng), tools=tuple(tool for tool in tools if tool.name in chosen)
        ),
        persona=persona(rng),
        goals=goals,
        initial=states[0],
        rubric=Rubric(
            changes=changes,
            keeps=keeps,
            required=tuple((tool,) for tool in sorted(used)),
            answers=tuple(answer for goal in goals for answer in goal.answers),
            max_calls=2 * sum(len(goal.calls) for goal in goals) + 3,
        ),
    )


def _recipe(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(FILES, 2)
    keys = dict(zip(names, rng.sample(KEYS, 2), strict=True))
    subjects = rng.sample(SUBJECTS, rng.randint(1, 2))
    commits = [
        {"subject": subject, "files": {name: f"{keys[name]} {rng.randrange(10, 999)}\n" for name in names}}
        for subject in subjects
    ]
    changed = {names[0]: f"{keys[names[0]]} {rng.randrange(1000, 2000)}\n"} if rng.random() < 0.6 else {}
    return {
        "repository": rng.choice(REPOSITORIES),
        "commits": commits,
        "branches": sorted(rng.sample(BRANCHES, rng.randint(0, 2))),
        "changed": changed,
    }


def _show(repository: str, state: State, recipe: Mapping[str, Any], rng: random.Random) -> tuple[Goal, State]:
    name = rng.choice(sorted(recipe["commits"][0]["files"]))
    key, value = recipe["commits"][-1]["files"][name].split()
    arguments = {"repo_path": repository, "revision": f"main:{name}"}
    request = f"what {key} does {name} have on main of {repository}"
    return _goal(request, [("git_show", arguments)], (value,)), state


def _list_branches(repository: str, state: State, recipe: Mapping[str, Any], rng: random.Random) -> tuple[Goal, State]:
    arguments = {"repo_path": repository, "branch_type": "local"}
    names = tuple(sorted(state["branches"]))
    return _goal(f"which local branches does {repository} have", [("git_branch", arguments)], names), state


def _last_subject(repository: str, state: State, recipe: Mapping[str, Any], rng: random.Random) -> tuple[Goal, State]:
    arguments = {"repo_path": repository, "max_count": 1}
    subject = state["branches"][state["head"]]
    return _goal(f"what is the last commit message of {repository}", [("git_log", arguments)], (subject,)), state


def _create_branch(
    repository: str, state: State, recipe: Mapping[str, Any], rng: random.Random
) -> tuple[Goal, State] | None:
    name = rng.choice(BRANCHES)
    if name in state["branches"]:
        return None
    after = deepcopy(state)
    after["branches"][name] = state["branches"][state["head"]]
    arguments = {"repo_path": repository, "branch_name": name}
    return _goal(f"create branch {name} in {repository}", [("git_create_branch", arguments)]), after


def _checkout(
    repository: str, state: State, recipe: Mapping[str, Any], rng: random.Random
) -> tuple[Goal, State] | None:
    """Only between branches at the same commit: others may refuse because of uncommitted changes."""
    tip = state["branches"][state["head"]]
    names = sorted(n for n, subject in state["branches"].items() if n != state["head"] and subject == tip)
    if not names:
        return None
    name = rng.choice(names)
    arguments = {"repo_path": repository, "branch_name": name}
    return _goal(f"switch {repository} to branch {name}", [("git_checkout", arguments)]), {**state, "head": name}


def _commit(repository: str, state: State, recipe: Mapping[str, Any], rng: random.Random) -> tuple[Goal, State] | None:
    if not state["changes"]:
        return None
    name, message = min(state["changes"]), f"{rng.choice(SUBJECTS)} {rng.randrange(2, 99)}"
    after = deepcopy(state)
    del after["changes"][name]
    after["branches"][state["head"]] = message
    calls: list[tuple[str, dict[str, Any]]] = [
        ("git_add", {"repo_path": repository, "files": [name]}),
        ("git_commit", {"repo_path": repository, "message": message}),
    ]
    return _goal(f"commit {name} in {repository} with message '{message}'", calls), after


def _goal(request: str, calls: Sequence[tuple[str, dict[str, Any]]], answers: tuple[str, ...] = ()) -> Goal:
    steps = tuple(Call(tool=tool, arguments=arguments) for tool, arguments in calls)
    return Goal(request=request, question=bool(answers), calls=steps, answers=answers)


GIT_GOALS: tuple[GitGoal, ...] = (_show, _list_branches, _last_subject, _create_branch, _checkout, _commit)
