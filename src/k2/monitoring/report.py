"""The HTML report of a run: one self-contained page from whatever the run left in the store."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2.ablations.page import study_section
from k2.errors import StageError, UserError
from k2.execution.registry import ALL_STAGES, COMPARE, STAGES
from k2.monitoring.blocks import Block, Missing, Preformatted, Section, StageView
from k2.monitoring.data_sections import corpus_section, rephrase_section, trajectory_section
from k2.monitoring.format import duration
from k2.monitoring.lineage import lineage, render_tree
from k2.monitoring.model_sections import (
    evaluation_section,
    gate_section,
    pretrain_section,
    quantize_section,
    rl_section,
    sft_section,
)
from k2.monitoring.page import render_template
from k2.monitoring.run_record import elapsed, read_run, summary
from k2.store.artifacts import open_uri
from k2.store.client import Store

log = logging.getLogger(__name__)

MAX_BYTES = 1_000_000
"""A report is no larger, so that it can be mailed and kept."""

LINEAGE_FROM = (
    "compare",
    "evaluate",
    "export",
    "quantize",
    "rl",
    "sft",
    "pretrain",
    "tokenize",
    "rephrase",
    "ingest",
    "corpus",
)
"""Stages whose artifact the tree starts from: the first that there is."""


@dataclass(frozen=True)
class Run:
    """What the page says about the run as a whole."""

    run: str
    preset: str
    status: str
    wall_s: float


def render_report(store: Store, run: Run, records: Sequence[Mapping[str, Any]], examples: int = 3) -> str:
    """The page. Every text in it is escaped; a section says so where the run recorded nothing.

    Fewer examples are shown if the page would exceed `MAX_BYTES`.
    """
    views = collect(store, records)
    tree = _lineage(store, views)
    page = ""
    for count in range(examples, -1, -1):
        page = _page(run, records, [*_sections(views, count), Section("lineage", "Lineage", [tree])])
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def publish_pages(
    store: Store, run: str, preset: str, status: str, examples: int = 3
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Put `summary.json` and `report.html` of a run, as it is now, under `runs/<run>/`.

    Returns them by name, and the records of the stages that they are about.
    """
    records = [record for record in read_run(store, run) if record["stage"] != "report"]
    about = Run(run, preset, status, elapsed(records))
    totals = summary(run, preset, status, about.wall_s, records)
    page = render_report(store, about, records, examples)
    pages = {"summary.json": json.dumps(totals, indent=1, sort_keys=True) + "\n", "report.html": page}
    for name, text in pages.items():
        store.put(f"runs/{run}/{name}", text.encode())
    return pages, records


def collect(store: Store, records: Sequence[Mapping[str, Any]]) -> dict[str, StageView]:
    """One view per stage of the DAG, also of those that never ran; of a study, its stages and trainings."""
    known = {record["stage"]: record for record in records}
    stages = [*known, COMPARE.name] if known.keys() - STAGES.keys() else STAGES
    return {stage: _view(store, stage, known.get(stage)) for stage in stages}


def _view(store: Store, stage: str, record: Mapping[str, Any] | None) -> StageView:
    if record is None:
        return StageView(stage, problem=f"{stage} did not run")
    if record["artifact"] is None:
        return StageView(stage, record, problem=f"{stage} made nothing: it {_ended(record['status'])}")
    try:
        artifact = open_uri(store, record["artifact"])
        report = artifact.json("report.json") if "report.json" in artifact.files else {}
    except (StageError, UserError, ValueError) as error:
        return StageView(stage, record, problem=str(error))
    return StageView(stage, record, report)


def _ended(status: str) -> str:
    return {"failed": "failed", "running": "was not finished"}.get(status, f"ended as {status}")


def _lineage(store: Store, views: Mapping[str, StageView]) -> Block:
    uris = (views[stage].record.get("artifact") for stage in LINEAGE_FROM if stage in views)
    uri = next((uri for uri in uris if uri), None)
    if uri is None:
        return Missing("lineage", "no stage has finished")
    try:
        tree = render_tree(lineage(store, uri))
    except (StageError, UserError) as error:
        return Missing("lineage", str(error))
    return Preformatted(tree, "What was made from what; the second column begins the digest of the content.")


def _sections(views: Mapping[str, StageView], examples: int) -> list[Section]:
    if COMPARE.name in views:
        view = views[COMPARE.name]
        return [_section(view, "Study", lambda: [*study_section(view)])]
    builders: tuple[tuple[str, str, Callable[[], list[Block]]], ...] = (
        ("evaluate", "Evaluation", lambda: evaluation_section(views)),
        ("gate", "Gate", lambda: gate_section(views)),
        ("corpus", "Corpus", lambda: corpus_section(views)),
        ("rephrase", "Rephrasing", lambda: rephrase_section(views, examples)),
        ("pretrain", "Pretraining", lambda: pretrain_section(views)),
        ("synthesize", "Agentic trajectories", lambda: trajectory_section(views)),
        ("sft", "Supervised fine-tuning", lambda: sft_section(views)),
        ("rl", "Reinforcement learning", lambda: rl_section(views)),
        ("quantize", "INT4 quantisation", lambda: quantize_section(views)),
    )
    return [_section(views[stage], title, build) for stage, title, build in builders]


def _section(view: StageView, title: str, build: Callable[[], list[Block]]) -> Section:
    """A section, or one note: its stage left nothing, or an artifact of another version has other data."""
    if view.problem:
        return Section(view.name, title, [Missing(title, view.problem)])
    try:
        return Section(view.name, title, build())
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        log.warning("report: section %s cannot be made: %r", title, error)
        return Section(view.name, title, [Missing("this section", f"its data have another shape ({error!r})")])


def _page(run: Run, records: Sequence[Mapping[str, Any]], sections: Sequence[Section]) -> str:
    rows = timeline(records)
    failures = [record for record in records if record["error"]]
    headline = _headline(records)
    return render_template(
        "report.html",
        title=run.run,
        kicker="K2 training run",
        run=run,
        rows=rows,
        failures=failures,
        sections=sections,
        headline=headline,
    )


def timeline(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every stage with where its bar begins and how long it is, in percent of the run."""
    begin = min((record["started"] for record in records), default=0.0)
    total = max((record["started"] + record["wall_s"] for record in records), default=0.0) - begin or 1.0
    return [
        {
            "stage": record["stage"],
            "title": stage_title(record["stage"]),
            "status": "cached" if record["cached"] else record["status"],
            "wall": duration(record["wall_s"]),
            "left": round(100 * (record["started"] - begin) / total, 2),
            "width": round(max(0.4, 100 * record["wall_s"] / total), 2),
        }
        for record in records
    ]


def stage_title(stage: str) -> str:
    """What a stage does; a training of a study says which it is by its name."""
    return ALL_STAGES[stage].title if stage in ALL_STAGES else "Train one arm of the study"


HEADLINE = (
    ("pretrain", "heldout_perplexity", "held-out perplexity", "{:.1f}"),
    ("rephrase", "accepted", "rewrites accepted", "{:,}"),
    ("synthesize", "accepted", "trajectories accepted", "{:,}"),
    ("rl", "accuracy_before", "accuracy before RL", "{:.1%}"),
    ("rl", "accuracy_after", "accuracy after RL", "{:.1%}"),
    ("quantize", "accuracy_int4", "accuracy in INT4", "{:.1%}"),
)
"""Stage, metric, name and format of the figures at the top."""


def _headline(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    metrics = {record["stage"]: record["metrics"] or {} for record in records}
    found = [(name, form, metrics.get(stage, {}).get(metric)) for stage, metric, name, form in HEADLINE]
    return [(name, form.format(value)) for name, form, value in found if isinstance(value, (int, float))]
