"""`schedules.yaml`: when which pipeline runs, and what has to hold for it."""

import json
from typing import Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from k2.config.base import Section, setting
from k2.config.deployment import Name
from k2.platform.cron import valid_cron

CRONJOB_FORM = "a recurring run of Kubeflow Pipelines cannot; use the CronJob form (docs/pipelines.md)"


class Guards(Section):
    """What has to hold when a run is due; otherwise it ends at once, green, and says why."""

    only_if_new: bool = setting(True, "run only when data, configuration or code changed since the last result")
    budget: float = setting(
        0.0, "run only while runs cost less than this, one more like the last included; 0: no limit", ge=0
    )
    budget_days: int = setting(30, "days that the budget is for", ge=1, le=366)


class Schedule(Section):
    """One recurring run."""

    cron: Annotated[str, AfterValidator(valid_cron)] = setting(
        ..., "minute hour day month weekday, in the server's time zone"
    )
    pipeline: str = setting("k2-retrain", "which pipeline; guards need k2-retrain")
    version: Name | None = setting(None, "name of the version; null: the newest when the schedule is applied")
    parameters: dict[str, Any] = setting({}, "parameters of the pipeline; overrides may be a mapping")
    guards: Guards | None = setting(None, "null: those of the pipeline's defaults")
    enabled: bool = setting(True, "whether it fires")
    max_concurrency: int = setting(1, "runs of it at the same time", ge=1, le=10)
    catchup: bool = setting(False, "make up for runs that were missed while the server was away")
    description: str = setting("", "shown in the UI", pattern=r"^[^\[\]]*$")
    time_zone: str | None = setting(None, "only in the CronJob form")
    concurrency_policy: str | None = setting(None, "only in the CronJob form")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.time_zone is not None:
            raise ValueError(
                f"time_zone {self.time_zone}: the zone is the server's (CRON_SCHEDULE_TIMEZONE), another {CRONJOB_FORM}"
            )
        if self.concurrency_policy is not None:
            raise ValueError(f"concurrency_policy {self.concurrency_policy}: replace or forbid {CRONJOB_FORM}")
        if "run" in self.parameters:
            raise ValueError("parameters.run: every run of a schedule needs its own name, so this stays empty")
        if self.guards and set(self.parameters) & set(Guards.model_fields):
            raise ValueError("parameters: guards are given under guards, not here")
        return self

    def values(self) -> dict[str, str]:
        """The parameters as text, guards included."""
        known = self.parameters | (self.guards.model_dump() if self.guards else {})
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}


class Schedules(Section):
    """The whole file: what is not in it is removed, as far as `k2 schedule` made it."""

    schedules: dict[Name, Schedule] = setting(..., "name -> schedule")
