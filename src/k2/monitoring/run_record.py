"""A run's record in the store: one small object per stage, written by whoever runs the stage.

runs/<run>/stages/<stage>.json     the latest state of one stage
runs/<run>/summary.json            all of them, once the report was made
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from k2.execution.registry import STAGES
from k2.store.client import Store

Status = Literal["running", "done", "failed"]

SUMMARY_FIELDS = ("status", "wall_s", "cached", "artifact", "metrics")
"""What `summary.json` says about a stage."""


class StageFailure(TypedDict):
    """Why a stage failed: the message names the thing; the remedy says what to do, where one is known."""

    message: str
    remedy: NotRequired[str]


class StageRecord(TypedDict):
    """One stage of one run. `updated` (Unix seconds) is set by `write_stage_record`."""

    stage: str
    status: Status
    wall_s: float
    cached: bool
    artifact: str | None
    metrics: Mapping[str, Any]
    error: StageFailure | None
    updated: NotRequired[float]


def write_stage_record(store: Store, run: str, record: StageRecord) -> None:
    """Store what a stage of a run is now, in place of what it was."""
    body = json.dumps({**record, "updated": round(time.time(), 3)}, sort_keys=True)
    store.put(f"runs/{run}/stages/{record['stage']}.json", body.encode())


def read_run(store: Store, run: str) -> list[StageRecord]:
    """The records of a run in the order of the DAG; empty when no stage has started."""
    names = [info.name for info in store.list(f"runs/{run}/stages/")]
    bodies = [body for name in names if (body := store.get(name)) is not None]
    records: list[StageRecord] = [json.loads(body) for body in bodies]
    order = {name: position for position, name in enumerate(STAGES)}
    return sorted(records, key=lambda record: (order.get(record["stage"], len(order)), record["stage"]))


def elapsed(records: Sequence[StageRecord]) -> float:
    """Seconds from the first start of a stage to the last change of one."""
    if not records:
        return 0.0
    return max(r.get("updated", 0.0) for r in records) - min(r.get("updated", 0.0) - r["wall_s"] for r in records)


def summary(run: str, preset: str, status: str, wall_s: float, records: Sequence[StageRecord]) -> dict[str, Any]:
    """`summary.json`: the run, and for every stage its status, wall time, artifact and metrics."""
    stages = {record["stage"]: {name: record.get(name) for name in SUMMARY_FIELDS} for record in records}
    return {"run": run, "preset": preset, "status": status, "wall_s": round(wall_s, 3), "stages": stages}
