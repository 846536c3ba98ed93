"""The record of a run, on a real store."""

import pytest

from k2.execution.registry import STAGES
from k2.monitoring import run_record
from k2.monitoring.run_record import StageRecord, elapsed, read_run, summary, write_stage_record
from k2.store.client import Store


def record(stage: str, **changes: object) -> StageRecord:
    values = {"stage": stage, "status": "done", "wall_s": 2.5, "cached": False, "artifact": f"s3://b/p/{stage}/k"}
    return {**values, "metrics": {"tokens": 7}, "error": None, **changes}  # type: ignore[typeddict-item,return-value]


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
    made = summary("r1", "tiny", "failed", 12.34567, [record("corpus"), record("rl", status="failed", updated=5.0)])
    assert {k: made[k] for k in ("run", "preset", "status", "wall_s")} == {
        "run": "r1",
        "preset": "tiny",
        "status": "failed",
        "wall_s": 12.346,
    }
    assert list(made["stages"]) == ["corpus", "rl"]
    assert set(made["stages"]["rl"]) == {"status", "wall_s", "cached", "artifact", "metrics"}
    assert made["stages"]["rl"]["status"] == "failed"


def test_elapsed_spans_from_the_first_start_to_the_last_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([103.0, 110.0])
    monkeypatch.setattr(run_record.time, "time", lambda: next(times))
    write_stage_record(store, "r2", record("corpus", wall_s=3.0))
    write_stage_record(store, "r2", record("ingest", wall_s=6.0))
    assert elapsed(read_run(store, "r2")) == pytest.approx(10.0)
    assert elapsed([]) == 0.0


def test_every_stage_name_sorts(store: Store) -> None:
    for stage in reversed(list(STAGES)):
        write_stage_record(store, "r3", record(stage))
    assert [r["stage"] for r in read_run(store, "r3")] == list(STAGES)
