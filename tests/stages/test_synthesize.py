"""The synthesize stage on real servers: what it publishes, that bytes repeat, and that a restart changes nothing."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from k2.agentic import synthesis
from k2.agentic import tasks as task_files
from k2.config.synthesize import SynthesizeConfig
from k2.errors import UserError
from k2.execution.contract import StageResult
from k2.serving.chat_template import render
from k2.serving.tool_calls import parse_assistant
from k2.stages import synthesize

CONFIG = SynthesizeConfig(
    domains=30, tasks=48, heldout_tasks=8, terse=True, max_tools=3, records=3, max_goals=2, shard=16, max_turns=16
)
Harness = Callable[..., StageResult]


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


@dataclass(frozen=True)
class Published:
    """One run of the stage, with its files copied to where they outlive the test that made them."""

    metrics: Mapping[str, Any]
    digest: str
    directory: Path


@pytest.fixture(scope="module")
def made() -> list[Published]:
    """The one run that all tests of this file share, once the first of them has made it."""
    return []


@pytest.fixture
def published(stage_harness: Harness, made: list[Published], tmp_path_factory: pytest.TempPathFactory) -> Published:
    if not made:
        result = stage_harness(synthesize.run, CONFIG, {})
        directory = tmp_path_factory.mktemp("published")
        shutil.copytree(result.artifact.directory(), directory, dirs_exist_ok=True)
        made.append(Published(result.metrics, result.artifact.digest, directory))
    return made[0]


def test_publishes_judged_trajectories(published: Published) -> None:
    accepted, rejected, tools = (
        rows(published.directory, f"{name}.jsonl") for name in ("trajectories", "rejected", "tools")
    )
    assert len(accepted) == published.metrics["accepted"] > 0
    assert len(accepted) + len(rejected) == published.metrics["trajectories"] == CONFIG.tasks
    assert sum(published.metrics["rejected_by_reason"].values()) == len(rejected) > 0
    assert len(tools) == published.metrics["tools"]
    assert published.metrics["mcp_servers"] == ["git", "time"]
    assert 0.5 < published.metrics["judge_precision"] <= 1
    assert 0.5 < published.metrics["judge_recall"] <= 1
    for row in accepted:
        assert all(score == 1 for score in row["scores"].values())
        assert "hidden" not in row
    assert any(row["task"]["world"] == "mcp:git" for row in accepted)


def test_heldout_worlds_never_train(published: Published) -> None:
    tools = rows(published.directory, "tools.jsonl")
    kept = {row["world"] for row in tools if row["split"] == "heldout"}
    assert {"mcp:time", "evolved:heating"} <= kept
    heldout = task_files.heldout(published.directory)
    assert len(heldout) == CONFIG.heldout_tasks  # every one was solved by the reference
    assert {task.world for task in heldout} <= kept
    heldout_names = {row["name"] for row in tools if row["split"] == "heldout"}
    for row in rows(published.directory, "trajectories.jsonl") + rows(published.directory, "rejected.jsonl"):
        assert row["task"]["world"] not in kept
        assert not heldout_names & {tool["function"]["name"] for tool in row["tools"]}


def test_trajectories_render_and_parse_in_the_chat_template(published: Published) -> None:
    for row in rows(published.directory, "trajectories.jsonl"):
        segments = render(row["messages"], row["tools"])
        turns = "".join(segment.text for segment in segments if segment.trainable).split("<|im_end|>")[:-1]
        calls = [call for turn in turns for call in parse_assistant(turn)[1]]
        written = [call for message in row["messages"] for call in message.get("tool_calls", [])]
        assert calls == written  # ids included: they count over the dialog


def test_bytes_repeat_in_shards_of_any_size(stage_harness: Harness, published: Published, progress: Any) -> None:
    other_shards = CONFIG.model_copy(update={"shard": 7})
    assert stage_harness(synthesize.run, other_shards, {}).artifact.digest == published.digest
    assert {event["name"] for event in progress.events} == {"git", "time"}
    assert progress.updates[-1]["done"] == CONFIG.tasks


def test_resumes_from_saved_shards(
    stage_harness: Harness, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays: list[int] = []
    play = synthesis.play

    def dying(repository: Any, tasks: Any, policy: Any) -> Any:
        plays.append(len(tasks))
        if len(plays) == 2:
            raise KeyboardInterrupt
        return play(repository, tasks, policy)

    def twice(config: Any, inputs: Any, output: Any, *, progress: Any) -> StageResult:
        with pytest.raises(KeyboardInterrupt):
            synthesize.run(config, inputs, output, progress=progress)
        return synthesize.run(config, inputs, output, progress=progress)

    twice.__module__ = synthesize.run.__module__
    monkeypatch.setattr(synthesize, "play", dying)
    assert stage_harness(twice, CONFIG, {}).artifact.digest == published.digest
    assert plays == [16, 16, 16, 16]  # the first shard once, the second again


def test_too_long_dialogs_are_rejected(stage_harness: Harness) -> None:
    result = stage_harness(synthesize.run, CONFIG.model_copy(update={"max_chars": 900}), {})
    assert result.metrics["rejected_by_reason"]["too_long"] > 0
    assert all(row["characters"] <= 900 for row in rows(result.artifact.directory(), "trajectories.jsonl"))


def test_unknown_heldout_domain_is_named(stage_harness: Harness) -> None:
    with pytest.raises(UserError, match=r"heldout_domains names \['nope'\]"):
        stage_harness(synthesize.run, CONFIG.model_copy(update={"heldout_domains": ("nope",)}), {})
