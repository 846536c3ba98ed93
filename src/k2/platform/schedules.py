"""Schedules as recurring runs: what has to change, and changing it.

Recurring runs cannot be updated and their names are not unique. So a changed schedule is created anew, disabled; then
the old one is deleted and the new one enabled. Whatever is interrupted is finished by the next `apply`. The description
of a recurring run holds the schedule's name and the digest of its specification; those without are left alone.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from k2.config.base import canonical_json
from k2.config.deployment import Deployment
from k2.errors import UserError
from k2.platform.api import PipelinesApi
from k2.platform.runs import typed
from k2.platform.schedule_file import Schedule, Schedules
from k2.platform.versions import find_version
from k2.store.client import Store
from k2.store.lease import exclusive

LEASE = "schedules/lease.json"
_MARK = re.compile(r"\[k2 schedule=(?P<name>\S+) spec=(?P<digest>[0-9a-f]{16})\]$")


@dataclass(frozen=True)
class Wanted:
    """What a recurring run should be; `digest` changes with all that the API cannot update."""

    name: str
    version: Any
    schedule: Schedule
    parameters: dict[str, Any]
    digest: str

    @property
    def description(self) -> str:
        """The text that people wrote, and the mark."""
        return f"{self.schedule.description}\n[k2 schedule={self.name} spec={self.digest}]".lstrip()


@dataclass(frozen=True)
class Change:
    """What happens to one schedule: `stale` recurring runs go, `current` (an ID) stays or is made."""

    action: Literal["create", "replace", "enable", "disable", "delete", "tidy", "keep"]
    name: str
    why: str
    wanted: Wanted | None = None
    current: str | None = None
    stale: tuple[str, ...] = ()


def plan(api: PipelinesApi, schedules: Schedules, deployment: Deployment) -> list[Change]:
    """Compare the file with the API server; changes nothing.

    Raises:
        UserError: a schedule names what is not there, or a guard cannot work.
    """
    wanted = [_wanted(api, name, schedule, deployment) for name, schedule in sorted(schedules.schedules.items())]
    there: dict[str, list[tuple[str, Any]]] = {}
    for name, digest, run in marked(api):
        there.setdefault(name, []).append((digest, run))
    changes = [_change(each, there.pop(each.name, [])) for each in wanted]
    return changes + [
        Change("delete", name, "not in the file", stale=tuple(run.recurring_run_id for _, run in runs))
        for name, runs in sorted(there.items())
    ]


def marked(api: PipelinesApi) -> Iterator[tuple[str, str, Any]]:
    """The recurring runs that K2 made: the schedule's name, the digest of its specification, and the run."""
    for run in api.recurring_runs():
        mark = _MARK.search(run.description or "")
        if mark:
            yield mark["name"], mark["digest"], run


def apply(api: PipelinesApi, store: Store, schedules: Schedules, deployment: Deployment) -> Iterator[Change]:
    """Make the API server what the file says; yields each change once it is done.

    Raises:
        UserError: as `plan`.
        StageError: someone else is applying schedules right now.
    """
    with exclusive(store, LEASE, "applying schedules") as lease:
        for change in plan(api, schedules, deployment):
            lease.assert_held()
            _execute(api, change)
            yield change


def _wanted(api: PipelinesApi, name: str, schedule: Schedule, deployment: Deployment) -> Wanted:
    version = find_version(api, schedule.pipeline, schedule.version)
    try:
        parameters = typed(schedule.values(), version)
    except UserError as error:
        raise UserError(f"schedules.{name}: {error}") from None
    if schedule.guards and schedule.guards.budget and not deployment.costs():
        raise UserError(
            f"schedules.{name}.guards.budget: no pool has a price, so nothing would ever count; set"
            " pools.<name>.cost_per_hour in the deployment file"
        )
    access = deployment.kubeflow
    fixed = {
        "parameters": parameters,
        "version": version.pipeline_version_id,
        "experiment": access.experiment,
        "service_account": access.service_account,
        **schedule.model_dump(include={"cron", "max_concurrency", "catchup", "description"}),
    }
    digest = hashlib.sha256(canonical_json(fixed).encode()).hexdigest()[:16]
    return Wanted(name, version, schedule, parameters, digest)


def _change(wanted: Wanted, there: Sequence[tuple[str, Any]]) -> Change:
    same = [run for digest, run in there if digest == wanted.digest]
    current = min(same, key=lambda run: (run.status != "ENABLED", run.created_at)) if same else None
    stale = tuple(run.recurring_run_id for _, run in there if run is not current)
    what = f"{wanted.schedule.cron}, {wanted.version.name or wanted.version.display_name}"
    if current is None:
        return Change("replace" if stale else "create", wanted.name, what, wanted, None, stale)
    identity = current.recurring_run_id
    if (current.status == "ENABLED") != wanted.schedule.enabled:
        return Change("enable" if wanted.schedule.enabled else "disable", wanted.name, what, wanted, identity, stale)
    if stale:
        return Change("tidy", wanted.name, f"{len(stale)} left from an interrupted apply", wanted, identity, stale)
    return Change("keep", wanted.name, what, wanted, identity)


def _execute(api: PipelinesApi, change: Change) -> None:
    """Create disabled, delete old, enable: at no time can two recurring runs of one schedule fire."""
    current, wanted = change.current, change.wanted
    if wanted and current is None:
        made = api.create_recurring_run(
            wanted.name,
            wanted.version,
            # The API's cron has seconds first.
            cron=f"0 {wanted.schedule.cron}",
            parameters=wanted.parameters,
            max_concurrency=str(wanted.schedule.max_concurrency),
            no_catchup=not wanted.schedule.catchup,
            description=wanted.description,
        )
        current = str(made.recurring_run_id)
    for identity in change.stale:
        api.delete_recurring_run(identity)
    if wanted and current and change.action in ("create", "replace", "enable") and wanted.schedule.enabled:
        api.enable(current)
    if current and change.action == "disable":
        api.disable(current)
