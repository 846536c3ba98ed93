"""The worlds behind the real MCP servers, kept reproducible: a scratch repository, and clocks without seasons."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from k2.agentic.mcp import McpServer, git
from k2.agentic.operations import ToolFailure
from k2.agentic.simulator import SimulatedWorld, World
from k2.agentic.tasks import Task
from k2.serving.chat_template import compact_json

# `convert_time` works on today's date. Zones whose offset never changes give the same clock times on every day; the
# day itself is replaced by this one, a Monday.
STABLE_ZONES = ("Asia/Tokyo", "Asia/Kolkata", "Asia/Dubai", "Asia/Singapore", "Africa/Lagos", "Asia/Kathmandu", "UTC")
DAY = datetime(2025, 1, 6)

# These read the wall clock, so no agent gets them.
VOLATILE_TOOLS = frozenset({"get_current_time"})


def open_world(task: Task, servers: Mapping[str, McpServer]) -> World:
    """The world of a task in its initial state. Raises KeyError when its server does not run."""
    kind, _, name = task.world.partition(":")
    if kind == "evolved":
        return SimulatedWorld(task)
    return GitWorld(task, servers[name]) if name == "git" else TimeWorld(servers[name])


class TimeWorld:
    """The time server; it has no state."""

    def __init__(self, server: McpServer) -> None:
        self._server = server

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """See World. The dates in the result are moved to a fixed day."""
        for zone in (arguments["source_timezone"], arguments["target_timezone"]):
            if zone not in STABLE_ZONES:
                raise ToolFailure(f"time zone {zone} is not supported")
        result = json.loads(self._server.call(tool, arguments))
        sides = {side: datetime.fromisoformat(result[side]["datetime"]) for side in ("source", "target")}
        offset = DAY.date() - sides["source"].date()
        for side, moment in sides.items():
            moved = moment + offset
            result[side] |= {"datetime": moved.isoformat(), "day_of_week": moved.strftime("%A")}
        return compact_json(result)

    def state(self) -> dict[str, Any]:
        """See World."""
        return {}


class GitWorld:
    """The git server on a scratch repository made from the task's recipe, in a directory no other episode sees."""

    def __init__(self, task: Task, server: McpServer) -> None:
        self._server = server
        self._name: str = task.initial["repository"]
        self._prefix = f"w{next(server.serial)}/"
        self._path = server.directory / self._prefix / self._name
        build_repository(self._path, task.initial)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """See World. The agent knows the repository by its name alone."""
        if arguments["repo_path"] != self._name:
            raise ToolFailure(f"no repository {arguments['repo_path']}")
        result = self._server.call(tool, {**arguments, "repo_path": self._prefix + self._name})
        return result.replace(str(self._server.directory), "").replace(self._prefix, "")

    def state(self) -> dict[str, Any]:
        """Branches with the subject of their last commit, the current branch, and uncommitted changes."""
        refs = git(self._path, "for-each-ref", "--format=%(refname:short)%09%(subject)", "refs/heads")
        changes = git(self._path, "status", "--porcelain")
        return {
            "head": git(self._path, "rev-parse", "--abbrev-ref", "HEAD").strip(),
            "branches": dict(line.split("\t", 1) for line in refs.splitlines()),
            "changes": {line[3:]: line[:2] for line in changes.splitlines()},
        }


def build_repository(path: Path, recipe: Mapping[str, Any]) -> None:
    """Make a repository: `commits` on main, `branches` at its tip, `changed` files left uncommitted."""
    path.mkdir(parents=True)
    git(path, "init", "--quiet", "--template=", "--initial-branch=main")
    git(path, "fast-import", "--quiet", stdin=_import_stream(recipe))
    git(path, "reset", "--quiet", "--hard", "main")
    for name, text in recipe["changed"].items():
        (path / name).write_text(text)


def _import_stream(recipe: Mapping[str, Any]) -> str:
    lines = []
    for commit in recipe["commits"]:
        lines += [
            "commit refs/heads/main",
            "committer Ada <ada@example.org> 1736154000 +0000",
            _data(commit["subject"]),
        ]
        lines += [f"M 100644 inline {name}\n{_data(text)}" for name, text in commit["files"].items()]
    lines += [f"reset refs/heads/{branch}\nfrom refs/heads/main\n" for branch in recipe["branches"]]
    return "\n".join(lines) + "\n"


def _data(text: str) -> str:
    return f"data {len(text.encode())}\n{text}"
