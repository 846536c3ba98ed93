"""Schedules: the file, the plan, applying it, and two people who apply at once."""

import json
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
from k2.platform.documents import read_section
from k2.platform.render import Rendering
from k2.platform.schedule_file import Schedules, _cron
from k2.platform.schedules import LEASE, apply, plan
from k2.platform.versions import prune, upload
from k2.store.client import Store
from k2.store.lease import Lease
from tests.platform import fake_kubeflow as fake

SHIPPED = Path(__file__).parents[2] / "pipelines" / "schedules.yaml"


@pytest.fixture(autouse=True)
def _uploaded(api: PipelinesApi, rendering: Rendering, guarded: Rendering) -> None:
    for each in (rendering, guarded):
        upload(api, each, "")


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
    upload(api, newer, "")
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
        ({"max_concurrency": 11}, "schedules.nightly.max_concurrency: Input should be less than or equal to 10"),
        ({"parameters": {"run": "x"}}, "schedules.nightly: parameters.run: every run of a schedule needs its own name"),
        ({"guards": {"budget": 1}, "parameters": {"budget": 2}}, "guards are given under guards"),
        ({"guard": {}}, "schedules.nightly.guard: there is no field 'guard' here; the fields are cron, pipeline"),
        ({"cron": None}, "schedules.nightly.cron: Input should be a valid string"),
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
    assert _cron(text) == text


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
        _cron(text)


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
