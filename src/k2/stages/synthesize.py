"""Stage synthesize: tools, agents, tasks and judged trajectories (Kimi K2 report, section 3.1.1)."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from k2.agentic import tasks as task_files
from k2.agentic.rollout import ModelPolicy, PlannerPolicy, Policy
from k2.agentic.synthesis import Repository, heldout_tasks, open_repository, play, public, report, training_task
from k2.agentic.tasks import Task
from k2.config.base import canonical_json
from k2.config.synthesize import SynthesizeConfig
from k2.execution.contract import Progress, StageResult
from k2.generation.factory import build_generator
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: SynthesizeConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Make the tool repository, play every task and keep the trajectories that the judge passes."""
    with open_repository(config) as repository:
        for name, tools in sorted(repository.listed.items()):
            progress.event("mcp_server", name=name, tools=[tool.name for tool in tools])
        tasks = [training_task(repository, index) for index in range(config.tasks)]
        records = _play_in_shards(repository, tasks, output, progress)
        heldout = heldout_tasks(repository)
        summary = report(records, repository) | {"tasks": len(tasks), "heldout_tasks": len(heldout)}
        _write(output, "tools.jsonl", repository.rows())
    _write(output, "trajectories.jsonl", (public(record) for record in records if not record["reasons"]))
    _write(output, "rejected.jsonl", (public(record) for record in records if record["reasons"]))
    task_files.write(output.path(task_files.TASKS_FILE), tasks)
    task_files.write(output.path(task_files.HELDOUT_FILE), heldout)
    output.path("report.json").write_text(canonical_json(summary))
    counts = ("tools", "tasks", "trajectories", "accepted", "rejected_by_reason", "domains", "mcp_servers", "mcp_tools")
    metrics = {name: summary[name] for name in counts}
    metrics |= {name: summary["judge"][name] for name in ("judge_precision", "judge_recall")}
    return StageResult(output.publish(**metrics))


def _play_in_shards(
    repository: Repository, tasks: Sequence[Task], output: ArtifactWriter, progress: Progress
) -> list[dict[str, Any]]:
    """Records of all tasks; shards finished before a restart are read back."""
    config = repository.config
    policy = _policy(config)
    records: list[dict[str, Any]] = []
    for start in range(0, len(tasks), config.shard):
        name = f"records-{start:06d}-{config.shard}.json"
        saved = output.work.load(name)
        if saved is None:
            saved = json.dumps(play(repository, tasks[start : start + config.shard], policy)).encode()
            output.work.save({name: saved})
        records += json.loads(saved)
        accepted = sum(not record["reasons"] for record in records)
        progress.update(len(records), len(tasks), "trajectories", accepted=accepted)
    return records


def _policy(config: SynthesizeConfig) -> Policy:
    if config.generator is None:
        return PlannerPolicy(config.mistake_rate, config.recovery_rate)
    return ModelPolicy(build_generator(config.generator), config.temperature, config.max_tokens)


def _write(output: ArtifactWriter, name: str, rows: Iterable[dict[str, Any]]) -> None:
    output.path(name).write_text("".join(canonical_json(row) + "\n" for row in rows))
