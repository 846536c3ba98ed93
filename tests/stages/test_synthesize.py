"""The synthesize stage on real servers: what it publishes, that bytes repeat, and that a restart changes nothing."""

import json
from collections.abc import Callable
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


def rows(result: StageResult, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.artifact.path(name).read_text().splitlines()]


@pytest.fixture
def published(stage_harness: Harness, shared: dict[str, StageResult]) -> StageResult:
    """The result of one run, made once for all tests of this file."""
    if "result" not in shared:
        shared["result"] = stage_harness(synthesize.run, CONFIG, {})
    return shared["result"]


@pytest.fixture(scope="module")
def shared() -> dict[str, StageResult]:
    return {}


def test_publishes_judged_trajectories(published: StageResult) -> None:
    result = published
    accepted, rejected, tools = (rows(result, f"{name}.jsonl") for name in ("trajectories", "rejected", "tools"))
    assert len(accepted) == result.metrics["accepted"] > 0
    assert len(accepted) + len(rejected) == result.metrics["trajectories"] == CONFIG.tasks
    assert sum(result.metrics["rejected_by_reason"].values()) == len(rejected) > 0
    assert len(tools) == result.metrics["tools"]
    assert result.metrics["mcp_servers"] == ["git", "time"]
    assert 0.5 < result.metrics["judge_precision"] <= 1
    assert 0.5 < result.metrics["judge_recall"] <= 1
    for row in accepted:
        assert all(score == 1 for score in row["scores"].values())
        assert "hidden" not in row
    assert any(row["task"]["world"] == "mcp:git" for row in accepted)


def test_heldout_worlds_never_train(published: StageResult) -> None:
    result = published
    tools = rows(result, "tools.jsonl")
    kept = {row["world"] for row in tools if row["split"] == "heldout"}
    assert {"mcp:time", "evolved:heating"} <= kept
    heldout = task_files.heldout(result.artifact.directory())
    assert len(heldout) == CONFIG.heldout_tasks  # every one was solved by the reference
    assert {task.world for task in heldout} <= kept
    heldout_names = {row["name"] for row in tools if row["split"] == "heldout"}
    for row in rows(result, "trajectories.jsonl") + rows(result, "rejected.jsonl"):
        assert row["task"]["world"] not in kept
        assert not heldout_names & {tool["function"]["name"] for tool in row["tools"]}


def test_trajectories_render_and_parse_in_the_chat_template(published: StageResult) -> None:
    for row in rows(published, "trajectories.jsonl"):
        segments = render(row["messages"], row["tools"])
        turns = "".join(segment.text for segment in segments if segment.trainable).split("<|im_end|>")[:-1]
        calls = [call for turn in turns for call in parse_assistant(turn)[1]]
        written = [call for message in row["messages"] for call in message.get("tool_calls", [])]
        assert calls == written  # ids included: they count over the dialog


def test_bytes_repeat_in_shards_of_any_size(stage_harness: Harness, published: StageResult, progress: Any) -> None:
    other_shards = CONFIG.model_copy(update={"shard": 7})
    assert stage_harness(synthesize.run, other_shards, {}).artifact.digest == published.artifact.digest
    assert {event["name"] for event in progress.events} == {"git", "time"}
    assert progress.updates[-1]["done"] == CONFIG.tasks


def test_resumes_from_saved_shards(
    stage_harness: Harness, published: StageResult, monkeypatch: pytest.MonkeyPatch
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
    assert stage_harness(twice, CONFIG, {}).artifact.digest == published.artifact.digest
    assert plays == [16, 16, 16, 16]  # the first shard once, the second again


def test_too_long_dialogs_are_rejected(stage_harness: Harness) -> None:
    result = stage_harness(synthesize.run, CONFIG.model_copy(update={"max_chars": 900}), {})
    assert result.metrics["rejected_by_reason"]["too_long"] > 0
    assert all(row["characters"] <= 900 for row in rows(result, "trajectories.jsonl"))


def test_unknown_heldout_domain_is_named(stage_harness: Harness) -> None:
    with pytest.raises(UserError, match=r"heldout_domains names \['nope'\]"):
        stage_harness(synthesize.run, CONFIG.model_copy(update={"heldout_domains": ("nope",)}), {})
