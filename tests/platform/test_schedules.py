"""Schedules: the file, the plan, applying it, and two people who apply at once."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from k2.cli import main
from k2.config.deployment import Deployment
from k2.errors import StageError, UserError
from k2.platform.api import PipelinesApi
from k2.platform.cron import last_due, valid_cron
from k2.platform.documents import read_section
from k2.platform.render import Rendering
from k2.platform.schedule_check import check
from k2.platform.schedule_file import Schedules
from k2.platform.schedules import LEASE, apply, plan
from k2.platform.versions import prune, upload
from k2.store.client import Store
from k2.store.lease import Lease
from tests.platform import fake_kubeflow as fake

SHIPPED = Path(__file__).parents[2] / "pipelines" / "schedules.yaml"


@pytest.fixture(autouse=True)
def _uploaded(api: PipelinesApi, rendering: Rendering, guarded: Rendering) -> None:
    for each in (rendering, guarded):
        upload(api, [each], "")


def schedules(**changes: Any) -> Schedules:
    """One schedule, with what a test changes."""
    return Schedules.model_validate({"schedules": {"nightly": {"cron": "0 3 * * *", **changes}}})


def applied(api: PipelinesApi, store: Store, wanted: Schedules, deployment: Deployment) -> list[tuple[str, str]]:
    return [(change.action, change.name) for change in apply(api, store, wanted, deployment)]


def test_the_shipped_file_is_accepted(api: PipelinesApi, gpu: Deployment) -> None:
    changes = plan(api, read_section(SHIPPED, Schedules), gpu)
    assert [(change.action, change.name) for change in changes] == [("create", "smoke"), ("create", "weekly")]


def test_create_keep_replace_disable_delete(
    api: PipelinesApi, kubeflow: fake.Kubeflow, store: Store, gpu: Deployment
) -> None:
    assert applied(api, store, schedules(), gpu) == [("create", "nightly")]
    (made,) = kubeflow.rows("recurringruns")
    assert made["status"] == "ENABLED"
    assert made["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert (made["max_concurrency"], made["no_catchup"]) == ("1", True)
    assert applied(api, store, schedules(), gpu) == [("keep", "nightly")]
    assert kubeflow.rows("recurringruns") == [made]

    changed = schedules(parameters={"preset": "nano"}, guards={"budget": 100}, description="For tests.")
    assert applied(api, store, changed, gpu) == [("replace", "nightly")]
    (second,) = kubeflow.rows("recurringruns")
    assert second["recurring_run_id"] != made["recurring_run_id"]
    assert second["runtime_config"]["parameters"] == {
        "preset": "nano",
        "only_if_new": True,
        "budget": 100.0,
        "budget_days": 30,
    }
    assert second["description"].startswith("For tests.\n[k2 schedule=nightly spec=")

    off = schedules(parameters={"preset": "nano"}, guards={"budget": 100}, description="For tests.", enabled=False)
    assert applied(api, store, off, gpu) == [("disable", "nightly")]
    assert kubeflow.rows("recurringruns")[0]["status"] == "DISABLED"
    assert applied(api, store, changed, gpu) == [("enable", "nightly")]
    assert applied(api, store, Schedules(schedules={}), gpu) == [("delete", "nightly")]
    assert kubeflow.rows("recurringruns") == []


def test_what_others_made_is_left_alone(
    api: PipelinesApi, kubeflow: fake.Kubeflow, store: Store, gpu: Deployment
) -> None:
    kubeflow.insert("recurringruns", "recurring_run_id", {"display_name": "nightly", "status": "ENABLED"})
    assert applied(api, store, schedules(), gpu) == [("create", "nightly")]
    assert applied(api, store, Schedules(schedules={}), gpu) == [("delete", "nightly")]
    assert [row["display_name"] for row in kubeflow.rows("recurringruns")] == ["nightly"]


@pytest.mark.parametrize("requests", range(7))
def test_an_interrupted_apply_is_finished_by_the_next(
    requests: int, api: PipelinesApi, kubeflow: fake.Kubeflow, store: Store, gpu: Deployment
) -> None:
    """Whatever request is the last, two schedules never fire, and the next apply ends with the one."""
    applied(api, store, schedules(), gpu)
    wanted = schedules(cron="0 4 * * *")
    kubeflow.admit = requests
    with pytest.raises(StageError):
        applied(api, store, wanted, gpu)
    assert sum(row["status"] == "ENABLED" for row in kubeflow.rows("recurringruns")) <= 1
    kubeflow.admit = None
    applied(api, store, wanted, gpu)
    (left,) = kubeflow.rows("recurringruns")
    assert left["status"] == "ENABLED"
    assert left["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * *"
    assert applied(api, store, wanted, gpu) == [("keep", "nightly")]


def test_a_new_version_replaces_the_schedule_and_the_old_one_can_go(
    api: PipelinesApi, kubeflow: fake.Kubeflow, store: Store, gpu: Deployment, guarded: Rendering
) -> None:
    applied(api, store, schedules(), gpu)
    newer = Rendering(guarded.pipeline, "", guarded.spec | {"sdkVersion": "next"}, guarded.platform)
    upload(api, [newer], "")
    assert prune(api, 1, dry_run=False) == []
    assert applied(api, store, schedules(version=guarded.version), gpu) == [("keep", "nightly")]
    assert applied(api, store, schedules(), gpu) == [("replace", "nightly")]
    assert prune(api, 1, dry_run=False) == [guarded.version]


def test_of_two_who_apply_one_wins_and_the_other_is_told(
    api: PipelinesApi, kubeflow: fake.Kubeflow, store: Store, gpu: Deployment
) -> None:
    with Lease(store, LEASE), pytest.raises(StageError, match=r"^\S+:\d+ is applying schedules; run again"):
        applied(api, store, schedules(), gpu)
    assert kubeflow.rows("recurringruns") == []
    assert applied(api, store, schedules(), gpu) == [("create", "nightly")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_zone": "Europe/Berlin"}, r"schedules.nightly: time_zone Europe/Berlin: .*use the CronJob form"),
        ({"concurrency_policy": "Replace"}, r"schedules.nightly: concurrency_policy Replace: .*use the CronJob form"),
        (
            {"cron": "0 0 3 * * *"},
            "schedules.nightly.cron: '0 0 3 .*' has 6 fields; write minute hour day month weekday",
        ),
        ({"cron": "0 24 * * *"}, "schedules.nightly.cron: '24' is no hour; allowed are .*, 0-23"),
        ({"cron": "@daily"}, "has 1 fields"),
        ({"max_concurrency": 11}, "schedules.nightly.max_concurrency: must be at most 10, found 11"),
        ({"parameters": {"run": "x"}}, "schedules.nightly: parameters.run: every run of a schedule needs its own name"),
        ({"guards": {"budget": 1}, "parameters": {"budget": 2}}, "guards are given under guards"),
        ({"guard": {}}, "schedules.nightly.guard: there is no field 'guard' here; the fields are cron, pipeline"),
        ({"cron": None}, "schedules.nightly.cron: must be text, found None"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "schedules.yaml"
    file.write_text(yaml.safe_dump({"schedules": {"nightly": {"cron": "0 3 * * *"} | changes}}))
    with pytest.raises(UserError, match=message):
        read_section(file, Schedules)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "k3"}, "pipeline 'k3': not on http"),
        ({"version": "k2-retrain-0"}, "version 'k2-retrain-0': k2-retrain has none of that name"),
        ({"parameters": {"presets": "nano"}}, "schedules.nightly: parameter 'presets': the pipeline has none"),
        ({"parameters": {"preset": "huge"}}, "schedules.nightly: preset: 'huge' is unknown"),
        ({"parameters": {"overrides": {"rl": {"sed": 1}}}}, "schedules.nightly: rl.sed: no such field"),
        ({"pipeline": "k2", "guards": {}}, "schedules.nightly: parameter 'only_if_new': the pipeline has none"),
        ({"guards": {"budget": 10}}, "schedules.nightly.guards.budget: no pool has a price"),
    ],
)
def test_what_the_server_lacks_is_refused_before_anything_changes(
    changes: dict[str, Any], message: str, api: PipelinesApi, kubeflow: fake.Kubeflow, store: Store, cpu: Deployment
) -> None:
    applied(api, store, schedules(), cpu)
    before = kubeflow.rows("recurringruns")
    with pytest.raises(UserError, match=message):
        applied(api, store, schedules(**changes), cpu)
    assert kubeflow.rows("recurringruns") == before


@given(
    st.tuples(
        *(
            st.one_of(
                st.just("*"),
                st.integers(low, high).map(str),
                st.tuples(st.integers(low, high), st.integers(low, high)).map(lambda p: f"{min(p)}-{max(p)}"),
                st.integers(1, 30).map(lambda step: f"*/{step}"),
            )
            for low, high in ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
        )
    ).map(" ".join)
)
def test_every_cron_of_the_usual_form_is_accepted(text: str) -> None:
    assert valid_cron(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "60 * * * *",
        "* * 0 * *",
        "* * * 13 *",
        "* * * * 7",
        "5-1 * * * *",
        "*/0 * * * *",
        "a * * * *",
        "* * * foo *",
        "1,,2 * * * *",
        "-1 * * * *",
        "² * * * *",
    ],
)
def test_no_other_cron_is(text: str) -> None:
    with pytest.raises(ValueError, match="is no "):
        valid_cron(text)


def k2(*arguments: str) -> Result:
    deployment = Path(__file__).parents[2] / "pipelines" / "deployments" / "gpu.yaml"
    return CliRunner().invoke(main, ["schedule", *arguments, "--deployment", str(deployment)])


def test_the_command_line(kubeflow: fake.Kubeflow, store: Store) -> None:
    planned = k2("plan", str(SHIPPED))
    assert planned.exit_code == 0, planned.output
    assert planned.stdout.startswith("+ smoke: create (30 1 * * *, k2-")
    assert kubeflow.rows("recurringruns") == []
    assert k2("apply", str(SHIPPED)).stdout == planned.stdout
    kept = json.loads(k2("apply", str(SHIPPED), "--json").stdout)
    assert [row["action"] for row in kept] == ["keep", "keep"]
    with Lease(store, LEASE):
        told = k2("apply", str(SHIPPED))
    assert told.exit_code == 1
    assert "is applying schedules" in told.stderr


@pytest.mark.parametrize(
    ("text", "now", "due"),
    [
        ("0 3 * * *", "2026-03-10 02:59", "2026-03-09 03:00"),
        ("0 3 * * *", "2026-03-10 03:00", "2026-03-10 03:00"),
        ("*/20 1-2,22 * * *", "2026-03-10 21:00", "2026-03-10 02:40"),
        ("5/20 * * * *", "2026-03-10 21:50", "2026-03-10 21:45"),
        ("0 3 * * sun", "2026-03-10 12:00", "2026-03-08 03:00"),
        ("0 0 29 feb *", "2026-03-10 12:00", "2024-02-29 00:00"),
        ("0 0 31 * mon", "2026-03-10 12:00", "2026-03-09 00:00"),
        ("0 0 9 * */2", "2026-03-20 12:00", "2025-12-09 00:00"),
        ("0 0 30 2 *", "2026-03-10 12:00", None),
    ],
)
def test_when_a_cron_fired_last(text: str, now: str, due: str | None) -> None:
    found = last_due(text, datetime.fromisoformat(now))
    assert found == (datetime.fromisoformat(due) if due else None)


@given(
    st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)), st.integers(0, 23), st.sampled_from(["*", "1-5", "0"])
)
def test_a_cron_fires_at_the_latest_minute_that_fits(now: datetime, hour: int, weekdays: str) -> None:
    """Against looking at every minute before."""
    fits = {"*": range(7), "1-5": range(1, 6), "0": range(1)}[weekdays]
    moment = now.replace(second=0, microsecond=0, minute=now.minute - now.minute % 15)
    while not (moment.hour == hour and moment.isoweekday() % 7 in fits):
        moment -= timedelta(minutes=15)
    assert last_due(f"*/15 {hour} * * {weekdays}", now) == moment


def checked(api: PipelinesApi, wanted: Schedules, now: str) -> list[tuple[str, bool]]:
    found = check(api, wanted, timedelta(hours=1), datetime.fromisoformat(now).replace(tzinfo=UTC))
    return [(each.why, each.late) for each in found]


def test_a_missed_run_is_found(api: PipelinesApi, kubeflow: fake.Kubeflow, store: Store, gpu: Deployment) -> None:
    wanted = schedules()
    absent = ("has no recurring run that is enabled; `k2 schedule apply` makes it", True)
    assert checked(api, wanted, "2026-01-02 05:00") == [absent]
    applied(api, store, wanted, gpu)
    (recurring,) = kubeflow.rows("recurringruns")
    assert checked(api, wanted, "2026-01-01 01:00") == [("was not due since it was made", False)]
    assert checked(api, wanted, "2026-01-02 03:59") == [("was due at 2026-01-01 03:00 UTC and did not begin", True)]
    identity = recurring["recurring_run_id"]
    run = {"display_name": "x", "recurring_run_id": identity, "state": "RUNNING"}
    made = kubeflow.insert("runs", "run_id", run)
    made["created_at"] = "2026-01-01T03:00:07Z"
    began = "was due at 2026-01-01 03:00 UTC and began at 2026-01-01 03:00 UTC"
    assert checked(api, wanted, "2026-01-02 03:59") == [(began, False)]
    going_on = f"was due at 2026-01-02 03:00 UTC and did not begin; run {made['run_id']} is still going on"
    assert checked(api, wanted, "2026-01-02 04:00") == [(going_on, True)]
    other = kubeflow.insert("runs", "run_id", {"display_name": "by hand", "state": "RUNNING"})
    other["created_at"] = "2026-01-02T03:00:00Z"
    assert checked(api, wanted, "2026-01-02 04:00") == [(going_on, True)]
    assert checked(api, schedules(enabled=False), "2026-01-02 04:00") == []
    api.access = api.access.model_copy(update={"time_zone": "Asia/Tokyo"})
    assert checked(api, wanted, "2026-01-01 19:00")[0][0].startswith("was due at 2026-01-02 03:00 JST and did not")
    api.access = api.access.model_copy(update={"time_zone": "Moon/Base"})
    with pytest.raises(UserError, match=r"kubeflow.time_zone: 'Moon/Base' is unknown"):
        checked(api, wanted, "2026-01-02 04:00")


def test_the_check_s_exit_code_is_what_the_cronjob_needs(kubeflow: fake.Kubeflow, store: Store) -> None:
    late = k2("check", str(SHIPPED))
    assert late.exit_code == 1
    assert late.stdout.startswith("late  smoke has no recurring run that is enabled")
    k2("apply", str(SHIPPED))
    for row in kubeflow.rows("recurringruns"):
        row["created_at"] = datetime.now(UTC).isoformat()
    assert k2("check", str(SHIPPED)).exit_code == 0
