"""Before a scheduled run starts: is there anything new to make, and does the budget allow it?"""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from k2.config.k2 import K2Config
from k2.config.load import validate
from k2.errors import StageError, UserError
from k2.execution.chain import stage_config
from k2.execution.registry import STAGES
from k2.execution.runner import lookup
from k2.monitoring.run_record import LAST, SPENDING, month, read_run
from k2.processes import end_with_run
from k2.store.artifacts import Artifact
from k2.store.client import Store

DAY_S = 86400.0

LONGEST_S = 31 * DAY_S
"""A stage takes less than this."""


def guard_component(
    config_json: str, only_if_new: bool, budget: float, budget_days: int, costs_json: str
) -> tuple[bool, str]:
    """Whether a run goes on, and why in one sentence; ends the process with code 2 when that cannot be told."""
    end_with_run()
    try:
        config, store = validate(json.loads(config_json)), Store.from_environment()
        fresh = first_missing(config, store) if only_if_new else "everything"
        if fresh is None:
            return False, "Nothing new: a result for this data, configuration and code exists."
        if budget > 0:
            fits, sums = within_budget(store, json.loads(costs_json), budget, budget_days)
            return fits, f"To make: {fresh}. Within budget: {sums}." if fits else f"Over budget: {sums}."
        return True, f"To make: {fresh}."
    except (UserError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def first_missing(config: K2Config, store: Store) -> str | None:
    """The first stage whose result for this data, configuration and code does not exist; None when all do."""
    made: dict[str, Artifact] = {}
    for name, spec in STAGES.items():
        if spec.always:
            continue
        inputs = {key: made[source] for key, source in spec.inputs.items()}
        found = lookup(name, stage_config(config, name), inputs, store)
        if found is None:
            return name
        made[name] = found
    return None


def within_budget(store: Store, costs: Mapping[str, float], budget: float, days: int) -> tuple[bool, str]:
    """Whether one more run like the last fits a budget, and the sums; `costs` is stage -> cost of an hour.

    Raises:
        UserError: `costs` is empty.
    """
    spent, expected = spending(store, costs, time.time() - days * DAY_S)
    sums = f"{spent:.2f} spent in {days} days and {expected:.2f} for one more run, of {budget:.2f}"
    return spent + expected <= budget, sums


def spending(store: Store, costs: Mapping[str, float], since: float) -> tuple[float, float]:
    """What runs have cost since a time (Unix seconds), and what the last finished one cost.

    `costs` is stage -> cost of an hour. Work counts from its start, cached stages cost nothing. Only what began since
    then, or up to `LONGEST_S` before, is read, by months.

    Raises:
        UserError: `costs` is empty.
    """
    if not costs:
        raise UserError(
            "budget: no pool has a price, so nothing would ever count; set pools.<name>.cost_per_hour in the"
            " deployment file and upload the pipeline again"
        )
    names = [info.name for each in _months(since - LONGEST_S) for info in store.list(f"{SPENDING}{each}/")]
    spent = sum(_cost(json.loads(body), costs, since) for name in names if (body := store.get(name)) is not None)
    last = store.get(LAST)
    records = read_run(store, json.loads(last)["run"]) if last else []
    return spent, sum(_cost(record, costs, 0.0) for record in records)


def _months(since: float) -> list[str]:
    """Every month from one moment to now."""
    days = range(int(since // DAY_S), int(time.time() // DAY_S) + 1)
    return sorted({month(day * DAY_S) for day in days})


def _cost(record: Mapping[str, Any], costs: Mapping[str, float], since: float) -> float:
    end = time.time() if record["status"] == "running" else record["updated"]
    if record["cached"] or record["stage"] not in costs:
        return 0.0
    hours: float = max(0.0, end - max(record["started"], since)) / 3600
    return costs[record["stage"]] * hours
