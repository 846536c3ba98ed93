"""Before a scheduled run starts: is there anything new to make, and does the budget allow it?"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from k2.config.k2 import K2Config
from k2.config.load import validate
from k2.errors import StageError, UserError
from k2.execution.chain import stage_config
from k2.execution.registry import STAGES
from k2.execution.runner import lookup
from k2.processes import end_with_run
from k2.store.artifacts import Artifact
from k2.store.client import Store

DAY_S = 86400.0


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
            spent, expected = spending(store, json.loads(costs_json), time.time() - budget_days * DAY_S)
            sums = f"{spent:.2f} spent in {budget_days} days and {expected:.2f} for one more run, of {budget:.2f}"
            if spent + expected > budget:
                return False, f"Over budget: {sums}."
            return True, f"To make: {fresh}. Within budget: {sums}."
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


def spending(store: Store, costs: Mapping[str, float], since: float) -> tuple[float, float]:
    """What runs have cost since a time (Unix seconds), and what the last finished one cost.

    `costs` is stage -> cost of an hour. Work counts from its start, cached stages cost nothing.

    Raises:
        UserError: `costs` is empty.
    """
    if not costs:
        raise UserError(
            "budget: no pool has a price, so nothing would ever count; set pools.<name>.cost_per_hour in the"
            " deployment file and upload the pipeline again"
        )
    by_run: dict[str, list[str]] = defaultdict(list)
    for info in store.list("runs/"):
        _, run, *rest = info.name.split("/")
        if rest[:1] == ["stages"]:
            by_run[run].append(info.name)
    spent, last, finished = 0.0, 0.0, 0.0
    for names in by_run.values():
        records = [json.loads(body) for name in names if (body := store.get(name)) is not None]
        spent += sum(_cost(record, costs, since) for record in records)
        ended = max((record["updated"] for record in records if record["stage"] == "report"), default=0.0)
        whole = sum(_cost(record, costs, 0.0) for record in records)
        if ended > finished and whole > 0:
            last, finished = whole, ended
    return spent, last


def _cost(record: Mapping[str, Any], costs: Mapping[str, float], since: float) -> float:
    end = time.time() if record["status"] == "running" else record["updated"]
    if record["cached"] or record["stage"] not in costs:
        return 0.0
    hours: float = max(0.0, end - max(record["started"], since)) / 3600
    return costs[record["stage"]] * hours
