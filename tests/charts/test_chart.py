"""The chart over a matrix of values: lint, valid objects, goldens, and the same platform as kustomize makes."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from k2.cli import main
from k2.config.deployment import Deployment
from k2.platform import pods
from k2.platform.schedule_file import Schedule, Schedules
from tests.manifests.render import (
    ROOT,
    Object,
    assert_restricted,
    is_custom,
    kustomize,
    name,
    pod_templates,
    tool,
    validate,
)

CHART = ROOT / "charts" / "k2"
EXAMPLE = CHART / "examples" / "gpu.yaml"
VALUES = Path(__file__).with_name("values")
GOLDEN = Path(__file__).with_name("golden")
FILES = {each.stem: each for each in (*sorted(VALUES.glob("*.yaml")), EXAMPLE)}
NAMESPACES = {"dev": "kubeflow", "prod": "kubeflow", "profile": "team-a", "gpu": "kubeflow"}
TOGGLES = [
    f"store.embedded.enabled=true,images.store=sha256:{'3' * 64}",
    "sandbox.enabled=true",
    "kueue.enabled=true",
    "trainer.enabled=true",
    "trainer.scope=Cluster,trainer.enabled=true",
    "monitoring.enabled=true",
    "externalSecrets.enabled=true",
    "network.policies=false",
    "admin=false,kueue.enabled=true",
    "delivery=none",
    "quota.pods=10",
    "pullSecrets={a,b}",
    "recurring.nightly.cron=0 3 * * *",
    "schedules[0].name=x,schedules[0].cron=0 3 * * *,schedules[0].pipeline=k2,schedules[0].parameters.preset=nano",
]
OPERATORS = {"kueue", "trainer", "monitoring", "externalSecrets"}
HELM_LABELS = {
    "helm.sh/chart",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "app.kubernetes.io/instance",
}


def helm(*arguments: str) -> str:
    command = [tool("helm"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


@cache
def rendered(*arguments: str, namespace: str = "kubeflow") -> tuple[Object, ...]:
    text = helm("template", "k2", str(CHART), "--namespace", namespace, *arguments)
    return tuple(each for each in yaml.safe_load_all(text) if each)


def from_file(values: str) -> tuple[Object, ...]:
    return rendered("--values", str(FILES[values]), namespace=NAMESPACES[values])


@pytest.mark.parametrize("values", FILES)
def test_lint_is_strict(values: str) -> None:
    helm("lint", "--strict", str(CHART), "--values", str(FILES[values]))


@pytest.mark.parametrize("values", FILES)
def test_every_object_is_valid_and_every_pod_restricted(values: str) -> None:
    check(from_file(values))


@pytest.mark.parametrize("toggle", TOGGLES)
def test_each_toggle_alone(toggle: str) -> None:
    changed = rendered("--set", toggle)
    check(changed)
    assert changed != rendered()
    if toggle.split(".")[0] not in OPERATORS and "kueue" not in toggle:
        assert not [name(each) for each in changed if is_custom(each)], "needs no operator"


def check(objects: tuple[Object, ...]) -> None:
    names = [name(each) for each in objects]
    assert len(names) == len(set(names))
    for each in objects:
        validate(each)
        assert set(each["metadata"]["labels"]) >= HELM_LABELS | {"app.kubernetes.io/part-of", "k2.dev/team"}
        for template in pod_templates(each):
            assert_restricted(template)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("images.cpu=latest", "cpu"),
        ("regestry=x", "regestry"),
        ("network.store=everywhere", "store"),
        ("trainer.scope=Galaxy", "scope"),
        ("kueue.teams.research.quota.cpu=lots", "cpu"),
        ("deployment.images.cpu=x", "images"),
        ("labels.team=a b", "team"),
        ("delivery=pigeon", "delivery"),
        ("schedules[0].name=n,schedules[0].pipeline=k2,schedules[0].cron=daily", "cron"),
    ],
)
def test_wrong_values_are_refused_by_name(setting: str, field: str) -> None:
    command = [tool("helm"), "template", "k2", str(CHART), "--set-string", setting]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert field in run.stderr


def test_the_schema_knows_every_value() -> None:
    """`additionalProperties: false` everywhere, so that a misspelt value is refused; lint has checked the rest."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    assert schema["additionalProperties"] is False


def test_the_example_for_a_gpu_cluster_is_short_and_makes_a_valid_deployment() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 15
    deployment = deployment_of(from_file("gpu"))
    assert deployment.pools["gpu"].accelerator is not None
    assert deployment.pull_secrets == ("registry",)
    assert deployment.images["gpu"].startswith("registry.example/k2/gpu@sha256:")


def deployment_of(objects: tuple[Object, ...]) -> Deployment:
    (each,) = [each for each in objects if name(each) == "ConfigMap/k2-deployment"]
    return Deployment.model_validate(yaml.safe_load(each["data"]["deployment.yaml"]))


def test_one_registry_value_and_pull_secrets_reach_everything() -> None:
    objects = rendered(
        *(
            "--values",
            str(FILES["prod"]),
            "--set",
            f"registry=reg.example/x,pullSecrets={{one}},store.embedded.enabled=true,images.store=sha256:{'3' * 64}",
        )
    )
    images = {
        container["image"].partition("@")[0]
        for each in objects
        for template in pod_templates(each)
        for container in template["spec"]["containers"]
    }
    assert images == {"reg.example/x/cpu", "reg.example/x/gpu", "reg.example/x/store"}
    assert all(image.startswith("reg.example/x/") for image in deployment_of(objects).images.values())
    accounts = {
        each["metadata"]["name"]: each["imagePullSecrets"] for each in objects if each["kind"] == "ServiceAccount"
    }
    assert set(map(str, accounts.values())) == {"[{'name': 'one'}]"}
    used = {template["spec"]["serviceAccountName"] for each in objects for template in pod_templates(each)}
    assert used <= set(accounts)


def test_what_cannot_change_in_an_upgrade_names_no_version() -> None:
    text = "\n".join(str(selector) for each in from_file("dev") for selector in selectors(each))
    assert "part-of" in text
    assert not [label for label in HELM_LABELS if label in text]


def selectors(each: Object) -> list[Any]:
    spec = each.get("spec", {})
    return [spec[key] for key in ("selector", "volumeClaimTemplates", "podSelector") if key in spec]


@pytest.mark.parametrize("values", ["dev", "gpu"])
def test_golden(values: str) -> None:
    """A change of a template shows as a change of these files: `UPDATE_GOLDEN=1 pytest tests/charts` writes them."""
    golden = GOLDEN / f"{values}.yaml"
    arguments = ["--namespace", NAMESPACES[values], "--values", str(FILES[values])]
    text = helm("template", "k2", str(CHART), *arguments)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.read_text() == text


def comparable(objects: tuple[Object, ...]) -> dict[str, Any]:
    """Objects by name, without what only helm or only Argo CD writes; files inside ConfigMaps as data."""
    found = {}
    for each in objects:
        metadata = dict(each["metadata"], labels={}, annotations={})
        metadata.pop("namespace", None)
        labels = {key: value for key, value in each["metadata"]["labels"].items() if key not in HELM_LABELS}
        data = {key: yaml.safe_load(value) for key, value in each.get("data", {}).items()}
        if name(each) == "ConfigMap/k2-deployment":
            schedules = {"schedules": data["schedules.yaml"]} if "schedules.yaml" in data else {}
            data = {"deployment": Deployment.model_validate(data["deployment.yaml"])} | schedules
        found[name(each)] = each | {"metadata": metadata | {"labels": labels}, "data": data}
    return found


def from_kustomize(*paths: str) -> dict[str, Any]:
    objects = [each for path in paths for each in kustomize(f"manifests/{path}")]
    return comparable(tuple(each for each in objects if each["kind"] != "Namespace"))


@pytest.mark.parametrize(
    ("values", "paths"),
    [
        ("dev", ["overlays/dev", "admin/base"]),
        ("prod", ["overlays/prod", "admin/overlays/standalone"]),
        ("profile", ["overlays/profile"]),
    ],
)
def test_chart_and_kustomize_make_the_same_platform(values: str, paths: list[str]) -> None:
    ours, theirs = comparable(from_file(values)), from_kustomize(*paths)
    clusterwide = {each for each in theirs if each.startswith("ClusterTrainingRuntime/")}
    theirs = {key: value for key, value in theirs.items() if key not in clusterwide}
    assert set(ours) == set(theirs)
    for key, mine in ours.items():
        other = theirs[key]
        labels = other["metadata"]["labels"]
        # The admin part of kustomize is applied by those who pay for nothing: it has no team of its own.
        missing = {label: value for label, value in mine["metadata"]["labels"].items() if label not in labels}
        assert all(label.startswith("k2.dev/") for label in missing), (key, missing)
        other["metadata"]["labels"] = labels | missing
        assert mine == other, key


def test_cluster_wide_runtimes_are_the_same_too() -> None:
    chart = comparable(rendered("--set", "trainer.enabled=true,trainer.scope=Cluster"))
    theirs = from_kustomize("admin/overlays/standalone")
    runtimes = {key: value["spec"] for key, value in chart.items() if key.startswith("ClusterTrainingRuntime/")}
    assert runtimes == {key: theirs[key]["spec"] for key in runtimes}
    assert len(runtimes) == 2


def test_jobs_of_the_platform_call_commands_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_DEPLOYMENT", "/etc/k2/deployment.yaml")
    calls = [
        template["spec"]["containers"][0]["command"]
        for each in rendered("--set", f"{TOGGLES[-1]},{TOGGLES[-2]}")
        if each["kind"] in ("Job", "CronJob")
        for template in pod_templates(each)
    ]
    assert sorted(each[2] for each in calls) == ["apply", "check", "submit", "upload"]
    for program, *arguments in calls:
        assert program == "k2"
        group: click.Command = main
        context = click.Context(main)
        while isinstance(group, click.Group):
            _, found, arguments = group.resolve_command(context, arguments)
            assert found is not None
            group = found
        group.make_context(group.name, list(arguments), parent=context)


def test_recurring_runs_and_cronjobs_say_what_the_commands_take() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    known = set(schema["recurring"]["additionalProperties"]["properties"])
    assert known == set(Schedule.model_fields) - {"time_zone", "concurrency_policy"}
    (file,) = [each for each in from_file("prod") if name(each) == "ConfigMap/k2-deployment"]
    schedules = Schedules.model_validate(yaml.safe_load(file["data"]["schedules.yaml"]))
    assert schedules.schedules["weekly"].guards is not None
    jobs = {name(each): each for each in from_file("prod") if each["kind"] == "Job"}
    weights = [each["metadata"]["annotations"].get("helm.sh/hook-weight", "0") for each in jobs.values()]
    assert (list(jobs), weights) == (["Job/k2-pipeline-upload", "Job/k2-schedule-apply"], ["0", "1"])
    changes = "schedules[0].concurrencyPolicy=Replace,schedules[0].timeZone=Asia/Tokyo"
    replaced = rendered("--set", f"{TOGGLES[-1]},{changes}")
    (cron,) = [each["spec"] for each in replaced if name(each) == "CronJob/k2-x"]
    (template,) = pod_templates(cron)
    assert template["spec"]["containers"][0]["command"][5:9] == ["--series", "x", "--when-running", "replace"]
    assert cron["timeZone"] == "Asia/Tokyo"


@pytest.mark.parametrize("values", ["gpu", "prod", "profile"])
def test_what_pods_serve_is_what_prometheus_may_and_can_scrape(values: str) -> None:
    """One port and one token in pods, PodMonitor and network policy; without monitoring there is neither."""
    objects = from_file(values)
    (monitor,) = [each["spec"] for each in objects if each["kind"] == "PodMonitor"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    deployment = deployment_of(objects)
    here = deployment.placement("pretrain")
    variables = pods.environment(here)
    assert (variables["K2_METRICS_PORT"], variables["K2_METRICS_HOST"]) == ("9464", "0.0.0.0")
    assert pods.secret_variables(here)["k2-metrics"] == {"token": "K2_METRICS_TOKEN"}
    assert endpoint["authorization"]["credentials"] == {"name": "k2-metrics", "key": "token"}
    assert endpoint["relabelings"][1]["replacement"] == f"$1:{variables['K2_METRICS_PORT']}"
    policies = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}
    for policy in ("k2-step", "k2-rank"):
        rule = policies[policy]["ingress"][-1]
        assert rule["ports"] == [{"protocol": "TCP", "port": pods.METRICS_PORT}]
        assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert "K2_METRICS_PORT" not in pods.environment(deployment_of(rendered()).placement("pretrain"))


def test_runs_have_the_account_of_the_values() -> None:
    assert deployment_of(from_file("profile")).kubeflow.service_account == "default-editor"
    assert deployment_of(from_file("gpu")).kubeflow.service_account == "pipeline-runner"


def test_rdma_is_the_one_exception_and_the_same_in_both() -> None:
    chart = comparable(rendered("--set", "trainer.enabled=true,trainer.rdma=rdma/hca"))["TrainingRuntime/k2-torch-gpu"]
    theirs = from_kustomize("components/rdma")["TrainingRuntime/k2-torch-gpu"]
    container = next(pod_templates(theirs))["spec"]["containers"][0]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    mine = next(pod_templates(chart))["spec"]["containers"][0]
    assert mine["securityContext"] == container["securityContext"]
    assert mine["resources"] == container["resources"]
    with pytest.raises(AssertionError):
        assert_restricted(next(pod_templates(theirs)))


def test_notes_say_what_is_left_to_do() -> None:
    more = ("--set", f"monitoring.enabled=true,{TOGGLES[-2]}")
    dry = ("install", "k2", str(CHART), "--dry-run=client", "--namespace", "ml", *more)
    run = subprocess.run([tool("helm"), *dry], capture_output=True, text=True, check=False)
    if "unreachable" in run.stderr:
        pytest.skip("helm wants a cluster even for a client dry run")
    assert "create secret generic k2-s3" in run.stdout
    assert "create secret generic k2-metrics --from-literal=token=" in run.stdout
    assert "keeps 1 recurring run(s)" in run.stdout
    assert "k2 doctor --cluster --namespace ml" in run.stdout
