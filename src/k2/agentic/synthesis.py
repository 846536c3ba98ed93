"""From configuration to tool repository, tasks, trajectories and the report on them."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from k2.agentic.agents import TaskShape, domain_task
from k2.agentic.dialog import DialogEnvironment
from k2.agentic.domains import Domain, seed_domains, tools_of
from k2.agentic.evolve import evolve, is_descendant
from k2.agentic.judge import confusion, reliability
from k2.agentic.mcp import McpServer, running_servers
from k2.agentic.mcp_tasks import mcp_task
from k2.agentic.mcp_worlds import open_world
from k2.agentic.rollout import Episode, PlannerPolicy, Policy, rollout
from k2.agentic.tasks import Task
from k2.agentic.tools import ToolSpec
from k2.config.synthesize import FaultRates, SynthesizeConfig
from k2.errors import UserError
from k2.serving.chat_template import render

Record = dict[str, Any]

NO_FAULTS = FaultRates(error=0, timeout=0, partial=0)


@dataclass(frozen=True)
class Repository:
    """All tools: evolved domains, and what the running MCP servers list; split into training and held-out worlds."""

    config: SynthesizeConfig
    domains: Sequence[Domain]
    servers: Mapping[str, McpServer]
    listed: Mapping[str, Sequence[ToolSpec]]

    def split_domains(self, *, heldout: bool) -> list[Domain]:
        """Domains of one side; a domain with any held-out ancestor is held out."""
        return [d for d in self.domains if is_descendant(d, self.config.heldout_domains) == heldout]

    def split_servers(self, *, heldout: bool) -> list[str]:
        """MCP servers of one side."""
        return [name for name in self.config.servers if (name in self.config.heldout_servers) == heldout]

    def rows(self) -> Iterator[Record]:
        """Every tool with its origin, its semantics and the side it is on."""
        for heldout in (False, True):
            split = "heldout" if heldout else "train"
            tools = [tool for domain in self.split_domains(heldout=heldout) for tool in tools_of(domain)]
            tools += [tool for name in self.split_servers(heldout=heldout) for tool in self.listed[name]]
            yield from ({**tool.model_dump(mode="json", exclude_none=True), "split": split} for tool in tools)

    def environment(self, rates: FaultRates) -> DialogEnvironment:
        """A fresh environment over these worlds."""
        return DialogEnvironment(lambda task: open_world(task, self.servers), rates, self.config.max_turns)


@contextmanager
def open_repository(config: SynthesizeConfig) -> Iterator[Repository]:
    """Evolve the domains and start the MCP servers, which stop at the end. Raises UserError for unknown domains."""
    known = {domain.name for domain in seed_domains()}
    unknown = sorted(set(config.heldout_domains) - known)
    if unknown:
        raise UserError(f"synthesize.heldout_domains names {unknown}; seed domains are {sorted(known)}")
    domains = evolve(config.domains, config.seed)
    with (
        TemporaryDirectory(prefix="k2-mcp-") as scratch,
        running_servers(config.servers, Path(scratch).resolve(), config.call_timeout_s) as servers,
    ):
        listed = {name: server.tools(terse=config.terse) for name, server in servers.items()}
        yield Repository(config, domains, servers, listed)


def training_task(repository: Repository, index: int) -> Task:
    """Task number `index`; independent of all others."""
    return _task(repository, f"train-{index:06d}", repository.config.mcp_share, heldout=False)


def heldout_tasks(repository: Repository) -> list[Task]:
    """Tasks on worlds that no training task touches, each proven solvable: the reference passes its own rubric."""
    config = repository.config
    share = (0.5 if config.heldout_domains else 1.0) if config.heldout_servers else 0.0
    count = config.heldout_tasks if config.heldout_domains or config.heldout_servers else 0
    tasks = [_task(repository, f"heldout-{index:06d}", share, heldout=True) for index in range(count)]
    policy = PlannerPolicy(mistake_rate=0, recovery_rate=0)
    episodes = rollout(tasks, policy, lambda: repository.environment(NO_FAULTS), config.seed)
    return [episode.task for episode in episodes if episode.passed]


def play(repository: Repository, tasks: Sequence[Task], policy: Policy) -> list[Record]:
    """Roll the tasks out and judge them; one record each, with `hidden` truths that only the report reads."""
    config = repository.config
    episodes = rollout(tasks, policy, lambda: repository.environment(config.faults), config.seed)
    mistakes = policy.mistakes if isinstance(policy, PlannerPolicy) else {}
    return [_record(episode, mistakes.get(episode.task.id), config.max_chars) for episode in episodes]


def public(record: Record) -> Record:
    """A record as it is published: without what the judge must not see."""
    return {name: value for name, value in record.items() if name != "hidden"}


def report(records: Sequence[Record], repository: Repository) -> Record:
    """Counts, the judge's reliability, and one trajectory of each kind to read."""
    accepted = [record for record in records if not record["reasons"]]
    rejected = [record for record in records if record["reasons"]]
    judged = [record for record in records if record["hidden"]["mistakes"] is not None]
    verdicts = [record["scores"]["passed"] == 1 for record in judged]
    flawed = [bool(record["hidden"]["mistakes"]) for record in judged]
    rows = list(repository.rows())
    return {
        "trajectories": len(records),
        "accepted": len(accepted),
        "rejected_by_reason": dict(sorted(Counter(record["reasons"][0] for record in rejected).items())),
        "accepted_by_difficulty": _rates(records, lambda record: str(record["task"]["difficulty"])),
        "accepted_by_world": _rates(records, lambda record: str(record["task"]["world"]).split(":")[0]),
        "judge": reliability(verdicts, flawed) | {"judged": len(judged), "flawed": sum(flawed)},
        "judge_confusion": confusion(verdicts, flawed),
        "mistakes": _rates(judged, lambda record: next(iter(record["hidden"]["mistakes"]), "none")),
        "faults": dict(sorted(Counter(fault for record in records for fault in record["hidden"]["faults"]).items())),
        "tools": len(rows),
        "domains": len(repository.domains),
        "mcp_servers": sorted(repository.servers),
        "mcp_tools": sum(len(tools) for tools in repository.listed.values()),
        "tools_by_domain": dict(sorted(Counter(row["world"] for row in rows).items())),
        "tools_by_category": dict(sorted(Counter(row["category"] for row in rows).items())),
        "accepted_example": public(max(accepted, key=_readable)) if accepted else None,
        "rejected_example": public(max(rejected, key=_readable)) if rejected else None,
    }


def _task(repository: Repository, task_id: str, mcp_share: float, *, heldout: bool) -> Task:
    config = repository.config
    rng = random.Random(f"{config.seed}/{task_id}")
    shape = TaskShape(
        config.min_tools,
        config.max_tools,
        config.records,
        config.max_goals,
        config.max_difficulty,
        config.terse,
    )
    if rng.random() < mcp_share:
        server = rng.choice(repository.split_servers(heldout=heldout))
        return mcp_task(server, repository.listed[server], shape, task_id, rng)
    return domain_task(rng.choice(repository.split_domains(heldout=heldout)), shape, task_id, rng)


def _record(episode: Episode, mistakes: Sequence[str] | None, max_chars: int | None) -> Record:
    task, messages, tools = episode.task, episode.environment.messages, episode.environment.tools
    reasons = [name for name, score in episode.scores.items() if score < 1 and name != "passed"]
    length = sum(len(segment.text) for segment in render(messages, tools))
    if max_chars is not None and length > max_chars:
        reasons.append("too_long")
    return {
        "id": task.id,
        "messages": [dict(message) for message in messages],
        "tools": list(tools),
        "task": {
            "world": task.world,
            "difficulty": task.difficulty,
            "persona": task.persona.model_dump(),
            "requests": [goal.request for goal in task.goals],
        },
        "rubric": task.rubric.model_dump(mode="json"),
        "scores": dict(episode.scores),
        "reasons": reasons,
        "characters": length,
        "hidden": {
            "mistakes": None if mistakes is None else list(mistakes),
            "faults": list(episode.environment.simulator.faults),
        },
    }


def _rates(records: Sequence[Record], group: Any) -> dict[str, dict[str, int]]:
    """Accepted by the judge and all, by group."""
    passed = Counter(group(record) for record in records if record["scores"]["passed"] == 1)
    return {
        name: {"all": count, "passed": passed[name]}
        for name, count in sorted(Counter(group(record) for record in records).items())
    }


def _readable(record: Record) -> tuple[int, int]:
    """Prefers dialogs with faults to recover from, then long ones."""
    return len(record["hidden"]["faults"]), len(record["messages"])
