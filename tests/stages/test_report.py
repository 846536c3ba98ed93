"""The report stage on a real store: artifact, mirror, and whether anything changed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from k2.config.base import semantic_values
from k2.config.report import ReportConfig
from k2.execution.contract import StageResult
from k2.monitoring.run_record import write_stage_record
from k2.stages.report import run
from k2.store.artifacts import Artifact
from k2.store.client import Store

Harness = Callable[..., StageResult]


def record(store: Store, stage: str, **changes: Any) -> None:
    write_stage_record(store, "r1", {"stage": stage, "status": "done", "wall_s": 1.0, "cached": True, **changes})


def test_summary_and_page_are_published_and_mirrored(
    store: Store, stage_harness: Harness, make_artifact: Callable[..., Artifact]
) -> None:
    corpus = make_artifact("corpus", {"report.json": b'{"sources": {"docs": {"documents": 3, "bytes": 900}}}'})
    record(store, "corpus", cached=False, artifact=corpus.uri, metrics={"documents": 3})
    record(store, "ingest", status="failed", error={"message": "no text is left"})
    write_stage_record(store, "r1", {"stage": "report", "status": "running"})
    config = ReportConfig(run="r1", preset="nano", status="failed")
    result = stage_harness(run, config, {})
    page = store.get("runs/r1/report.html")
    assert page is not None
    assert result.artifact.path("report.html").read_bytes() == page
    assert result.metrics == {"changed": True, "bytes": len(page)} == result.artifact.statistics
    summary = result.artifact.json("summary.json")
    assert json.loads(store.get("runs/r1/summary.json") or b"") == summary
    assert (summary["run"], summary["preset"], summary["status"]) == ("r1", "nano", "failed")
    assert list(summary["stages"]) == ["corpus", "ingest"]
    assert summary["stages"]["corpus"]["artifact"] == corpus.uri
    assert b"no text is left" in page


def test_nothing_changed_when_every_stage_was_cached(store: Store, stage_harness: Harness) -> None:
    record(store, "corpus")
    record(store, "ingest")
    assert stage_harness(run, ReportConfig(run="r1"), {}).metrics["changed"] is False
    record(store, "ingest", cached=False)
    assert stage_harness(run, ReportConfig(run="r1"), {}).metrics["changed"] is True


def test_a_run_without_records_has_a_report(store: Store, stage_harness: Harness) -> None:
    result = stage_harness(run, ReportConfig(run="never", status="interrupted"), {})
    assert b"No stage has started" in result.artifact.path("report.html").read_bytes()
    assert result.metrics["changed"] is True


def test_the_configuration_names_a_run_safely_and_decides_no_bytes() -> None:
    with pytest.raises(ValidationError):
        ReportConfig(run="../other")
    assert semantic_values(ReportConfig(run="a")) == semantic_values(ReportConfig(run="b", status="failed"))
