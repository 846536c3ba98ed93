"""A run's record in the store: one small object per stage, written by whoever runs the stage.

runs/<run>/stages/<stage>.json     the latest state of one stage
runs/<run>/summary.json            all of them, once the report was made
spending/<month>/<run>/<stage>.json  when work on a stage began and ended, by the month it began in
spending/last.json                 the last run that was reported on and had worked

Budgets read the last two, however many runs there are.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from k2.execution.registry import STAGES
from k2.masking import masked
from k2.processes import rank
from k2.store.client import Store

SPENDING = "spending/"
LAST = f"{SPENDING}last.json"

StageRecord = Mapping[str, Any]
"""`stage`, `status` (running, done, failed), `wall_s`, `cached`, `artifact` (URI), `metrics`, `error` (`message`,
perhaps `remedy`), and what `write_stage_record` adds: `started` and `updated`, Unix seconds."""

SUMMARY_FIELDS = ("status", "wall_s", "cached", "artifact", "metrics")
"""What `summary.json` says about a stage; a failed one also has its `error`."""


def write_stage_record(store: Store, run: str, record: StageRecord) -> None:
    """Store what a stage of a run is now, in place of what it was.

    `record` names `stage` and `status`; without a `wall_s` it is the time since the stage was recorded as running. Of
    several ranks only the first one's word counts.
    """
    if rank() > 0:
        return
    name, now = f"runs/{run}/stages/{record['stage']}.json", round(time.time(), 3)
    before = None if record["status"] == "running" else store.get(name)
    started = json.loads(before)["started"] if before else now - record.get("wall_s", 0.0)
    known = {"wall_s": round(now - started, 3), "cached": False, "artifact": None, "metrics": {}, "error": None}
    whole = {**known, **record, "started": started, "updated": now}
    store.put(name, masked(json.dumps(whole, sort_keys=True)).encode())
    _note_spending(store, run, whole)


def _note_spending(store: Store, run: str, record: StageRecord) -> None:
    if record["stage"] != "report":
        entry = {name: record[name] for name in ("stage", "status", "cached", "started", "updated")}
        store.put(f"{SPENDING}{month(record['started'])}/{run}/{record['stage']}.json", json.dumps(entry).encode())
    elif record["status"] == "done":
        others = [each for each in read_run(store, run) if each["stage"] != "report"]
        if not all(each["cached"] for each in others):
            store.put(LAST, json.dumps({"run": run}).encode())


def month(moment: float) -> str:
    """The month (UTC) of a Unix time, such as `2026-11`."""
    return time.strftime("%Y-%m", time.gmtime(moment))


def read_run(store: Store, run: str) -> list[dict[str, Any]]:
    """The records of a run in the order of the DAG; empty when no stage has started."""
    names = [info.name for info in store.list(f"runs/{run}/stages/")]
    records = [json.loads(body) for name in names if (body := store.get(name)) is not None]
    order = {name: position for position, name in enumerate(STAGES)}
    return sorted(records, key=lambda record: (order.get(record["stage"], len(order)), record["stage"]))


def elapsed(records: Sequence[StageRecord]) -> float:
    """Seconds from the first start of a stage to the last change of one."""
    if not records:
        return 0.0
    return float(max(record["updated"] for record in records) - min(record["started"] for record in records))


def summary(run: str, preset: str, status: str, wall_s: float, records: Sequence[StageRecord]) -> dict[str, Any]:
    """`summary.json`: the run, and for every stage its status, wall time, artifact and metrics."""
    stages = {record["stage"]: _stage_summary(record) for record in records}
    return {"run": run, "preset": preset, "status": status, "wall_s": round(wall_s, 3), "stages": stages}


def _stage_summary(record: StageRecord) -> dict[str, Any]:
    error = {"error": record["error"]} if record["error"] else {}
    return {name: record[name] for name in SUMMARY_FIELDS} | error
