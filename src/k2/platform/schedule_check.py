"""Whether schedules fire. Kubeflow counts no missed recurring run, so a CronJob asks, and its failure is the alert."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from k2.config.deployment import Kubeflow
from k2.errors import UserError
from k2.platform.api import ENDED, PipelinesApi
from k2.platform.cron import last_due
from k2.platform.schedule_file import Schedule, Schedules
from k2.platform.schedules import marked


@dataclass(frozen=True)
class Checked:
    """One schedule: whether its last run is missing, and what was found."""

    name: str
    late: bool
    why: str


def check(api: PipelinesApi, schedules: Schedules, patience: timedelta, now: datetime | None = None) -> list[Checked]:
    """Look for the run of the last time that each enabled schedule was due, `patience` ago or earlier.

    Raises:
        UserError: the zone of the deployment file is not one.
    """
    there = {name: run for name, _, run in marked(api) if run.status == "ENABLED"}
    limit = (now or datetime.now(UTC)).astimezone(zone(api.access)) - patience
    wanted = {name: each for name, each in sorted(schedules.schedules.items()) if each.enabled}
    return [_checked(api, name, schedule, there, limit) for name, schedule in wanted.items()]


def zone(access: Kubeflow) -> Any:
    """The zone that the server reads crons in.

    Raises:
        UserError: there is none of this name here.
    """
    try:
        return UTC if access.time_zone == "UTC" else ZoneInfo(access.time_zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise UserError(
            f"kubeflow.time_zone: {access.time_zone!r} is unknown here; write it as Europe/Berlin"
        ) from None


def _checked(api: PipelinesApi, name: str, schedule: Schedule, there: Mapping[str, Any], limit: datetime) -> Checked:
    recurring = there.get(name)
    if recurring is None:
        return Checked(name, True, "has no recurring run that is enabled; `k2 schedule apply` makes it")
    due = last_due(schedule.cron, limit)
    if due is None or due < recurring.created_at:
        return Checked(name, False, "was not due since it was made")
    said = f"was due at {due:%Y-%m-%d %H:%M %Z}"
    going_on = ""
    for run in api.runs():
        ours = run.recurring_run_id == recurring.recurring_run_id
        if ours and run.created_at >= due:
            return Checked(name, False, f"{said} and began at {run.created_at:%Y-%m-%d %H:%M %Z}")
        if ours and run.state not in ENDED:
            going_on = f"; run {run.run_id} is still going on"
        if run.created_at < due:
            break
    return Checked(name, True, f"{said} and did not begin{going_on}")
