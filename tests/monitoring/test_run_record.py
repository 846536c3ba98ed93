"""The record of a run, on a real store."""

from typing import Any

import pytest

from k2.execution.registry import STAGES
from k2.monitoring import run_record
from k2.monitoring.run_record import elapsed, read_run, summary, write_stage_record
from k2.store.client import Store

ERROR = {"message": "out of memory"}


def record(stage: str, **changes: Any) -> dict[str, Any]:
    known = {"status": "done", "wall_s": 2.5, "cached": False, "artifact": f"s3://b/p/{stage}/k"}
    return {"stage": stage, **known, "metrics": {"tokens": 7}, "error": None, **changes}


def test_records_come_back_in_the_order_of_the_dag_and_the_last_write_of_a_stage_wins(store: Store) -> None:
    write_stage_record(store, "r1", record("rl", status="running", artifact=None))
    write_stage_record(store, "r1", record("corpus"))
    write_stage_record(store, "r1", record("rl", status="failed", error={"message": "out of memory"}))
    write_stage_record(store, "r10", record("sft"))
    found = read_run(store, "r1")
    assert [(r["stage"], r["status"]) for r in found] == [("corpus", "done"), ("rl", "failed")]
    assert found[1]["error"] == {"message": "out of memory"}
    assert read_run(store, "never") == []


def test_summary_has_the_documented_shape() -> None:
    made = summary("r1", "tiny", "failed", 12.34567, [record("corpus"), record("rl", status="failed", error=ERROR)])
    assert {k: made[k] for k in ("run", "preset", "status", "wall_s")} == {
        "run": "r1",
        "preset": "tiny",
        "status": "failed",
        "wall_s": 12.346,
    }
    assert list(made["stages"]) == ["corpus", "rl"]
    assert set(made["stages"]["corpus"]) == {"status", "wall_s", "cached", "artifact", "metrics"}
    assert made["stages"]["rl"]["error"] == ERROR


def test_wall_time_counts_from_the_record_of_the_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 103.0, 103.5, 110.0])
    monkeypatch.setattr(run_record.time, "time", lambda: next(times))
    write_stage_record(store, "r2", {"stage": "corpus", "status": "running"})
    write_stage_record(store, "r2", record("corpus", wall_s=2.9))
    write_stage_record(store, "r2", {"stage": "ingest", "status": "running"})
    write_stage_record(store, "r2", {"stage": "ingest", "status": "failed", "error": ERROR})
    found = read_run(store, "r2")
    assert [r["wall_s"] for r in found] == [2.9, 6.5]
    assert (found[1]["artifact"], found[1]["metrics"]) == (None, {})
    assert elapsed(found) == pytest.approx(10.0)
    assert elapsed([]) == 0.0


def test_every_stage_name_sorts(store: Store) -> None:
    for stage in reversed(list(STAGES)):
        write_stage_record(store, "r3", record(stage))
    assert [r["stage"] for r in read_run(store, "r3")] == list(STAGES)
