"""Real MCP servers: listed, called, reproducible, confined, and gone afterwards."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.agentic import mcp
from k2.agentic.dialog import DialogEnvironment
from k2.agentic.mcp import McpServer, running_servers
from k2.agentic.mcp_tasks import mcp_task
from k2.agentic.mcp_worlds import STABLE_ZONES, VOLATILE_TOOLS, open_world
from k2.agentic.operations import ToolFailure
from k2.agentic.rollout import PlannerPolicy, rollout
from k2.agentic.tasks import Task
from k2.errors import StageError
from tests.agentic.helpers import CALM, SHAPE


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, McpServer]]:
    with running_servers(("git", "time"), tmp_path_factory.mktemp("mcp"), 60) as running:
        yield running


def tasks(servers: dict[str, McpServer], name: str, count: int) -> list[Task]:
    rng = random.Random(4)
    tools = servers[name].tools(terse=True)
    return [mcp_task(name, tools, SHAPE, f"{name}-{index}", rng) for index in range(count)]


def children() -> set[int]:
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for path in listed for pid in path.read_text().split()}


def test_servers_list_their_tools(servers: dict[str, McpServer]) -> None:
    assert {tool.name for tool in servers["time"].tools(terse=False)} == {"convert_time", "get_current_time"}
    full = {tool.name: tool for tool in servers["git"].tools(terse=False)}
    terse = {tool.name: tool for tool in servers["git"].tools(terse=True)}
    assert len(full) == len(terse) >= 12
    assert set(terse["git_log"].parameters["properties"]) == {"repo_path", "max_count"}
    assert len(str(terse["git_log"].parameters)) < len(str(full["git_log"].parameters)) / 3


@pytest.mark.parametrize(("name", "count"), [("git", 24), ("time", 8)])
def test_reference_calls_reach_the_predicted_state(servers: dict[str, McpServer], name: str, count: int) -> None:
    def environment() -> DialogEnvironment:
        return DialogEnvironment(lambda task: open_world(task, servers), CALM, 20)

    first, second = (rollout(tasks(servers, name, count), PlannerPolicy(0, 0), environment, seed=1) for _ in range(2))
    assert [(e.task.goals, e.scores) for e in first if not e.passed] == []
    # Byte for byte the same, commit hashes included, although the repositories are in other directories.
    assert [e.environment.messages for e in first] == [e.environment.messages for e in second]
    offered = {tool.name for e in first for tool in e.task.agent.tools}
    assert not offered & VOLATILE_TOOLS


def test_clock_answers_carry_no_date_of_today(servers: dict[str, McpServer]) -> None:
    world = open_world(tasks(servers, "time", 1)[0], servers)
    arguments = {"source_timezone": "Asia/Tokyo", "time": "02:00", "target_timezone": "UTC"}
    answer = world.call("convert_time", arguments)
    assert '"datetime":"2025-01-06T02:00:00+09:00","day_of_week":"Monday"' in answer
    assert '"datetime":"2025-01-05T17:00:00+00:00","day_of_week":"Sunday"' in answer
    with pytest.raises(ToolFailure, match="Europe/Paris is not supported"):
        world.call("convert_time", {**arguments, "source_timezone": "Europe/Paris"})
    with pytest.raises(ToolFailure, match="Invalid time format"):
        world.call("convert_time", {**arguments, "time": "26:99"})
    assert "UTC" in STABLE_ZONES


def test_the_git_world_is_confined(servers: dict[str, McpServer]) -> None:
    world = open_world(tasks(servers, "git", 1)[0], servers)
    for path in ("/", "..", "../.."):
        with pytest.raises(ToolFailure, match="no repository"):
            world.call("git_status", {"repo_path": path})


def test_servers_are_reaped_also_after_errors(tmp_path: Path) -> None:
    before = children()

    def failing() -> None:
        with running_servers(("time",), tmp_path, 60):
            assert children() - before
            raise ValueError("in the block")

    with pytest.raises(ValueError, match="in the block"):
        failing()
    assert children() <= before


def test_a_server_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    monkeypatch.setitem(mcp.COMMANDS, "time", ("k2_no_such_module",))
    with (
        pytest.raises(StageError, match=r"MCP server time did not start: .*k2_no_such_module"),
        running_servers(("git", "time"), tmp_path, 60),
    ):
        pass
    assert children() <= before


def test_servers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from k2.agentic.mcp import running_servers\n"
        "with running_servers(('git', 'time'), pathlib.Path(sys.argv[1]), 60):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "up\n"
        started = {
            int(pid) for path in Path(f"/proc/{parent.pid}/task").glob("*/children") for pid in path.read_text().split()
        }
        parent.kill()
    assert len(started) == 2
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in started)


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie that nobody has collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
