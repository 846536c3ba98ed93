"""From `helm install` or `kubectl apply -k` to a pipeline in the UI: nothing is missing but Secrets that are named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from k2.cli import main
from tests.charts.test_chart import from_file
from tests.manifests.render import Object, allowed, kustomize, name, pod_templates
from tests.platform import fake_kubeflow as fake
from tests.platform.conftest import kubeflow

__all__ = ["kubeflow"]

INSTALLS = {
    "chart, no operator": lambda: from_file("dev"),
    "chart, GPU cluster": lambda: from_file("gpu"),
    "kustomize, no operator": lambda: (*kustomize("manifests/overlays/dev"), *kustomize("manifests/admin/base")),
    "kustomize, all operators": lambda: (
        *kustomize("manifests/overlays/prod"),
        *kustomize("manifests/admin/overlays/standalone"),
    ),
}
SECRETS = {"k2-s3", "k2-metrics", "registry"}
"""Named in docs/platform.md and in the values; with the External Secrets Operator they are made too."""


@pytest.fixture(params=INSTALLS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return tuple(INSTALLS[request.param]())


def upload(objects: tuple[Object, ...]) -> Object:
    (job,) = [each for each in objects if name(each) == "Job/k2-pipeline-upload"]
    return job


def named(pod: Any) -> Iterator[str]:
    """What a pod needs to be there, as KIND/NAME."""
    yield f"ServiceAccount/{pod['serviceAccountName']}"
    if "priorityClassName" in pod:
        yield f"PriorityClass/{pod['priorityClassName']}"
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            yield f"ConfigMap/{volume['configMap']['name']}"
        if "persistentVolumeClaim" in volume:
            yield f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}"
        if "secret" in volume:
            yield f"Secret/{volume['secret']['secretName']}"
    for each in pod.get("imagePullSecrets", []):
        yield f"Secret/{each['name']}"
    for container in pod["containers"]:
        yield from (f"Secret/{each['secretRef']['name']}" for each in container.get("envFrom", []))
        sources = [each.get("valueFrom", {}) for each in container.get("env", [])]
        yield from (f"Secret/{each['secretKeyRef']['name']}" for each in sources if "secretKeyRef" in each)


def test_every_pod_finds_what_it_needs(objects: tuple[Object, ...]) -> None:
    there = {name(each) for each in objects} | {f"Secret/{each}" for each in SECRETS}
    needed = {
        (name(each), what) for each in objects for template in pod_templates(each) for what in named(template["spec"])
    }
    assert needed
    assert not {(each, what) for each, what in needed if what not in there}


def test_the_upload_comes_after_everything_else(objects: tuple[Object, ...]) -> None:
    hooks = upload(objects)["metadata"]["annotations"]
    assert hooks.get("helm.sh/hook") == "post-install,post-upgrade" or hooks["argocd.argoproj.io/hook"] == "PostSync"


def test_the_upload_may_reach_kubeflow_and_names(objects: tuple[Object, ...]) -> None:
    (template,) = pod_templates(upload(objects))
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    labels = template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": "k2-pipeline-upload"}
    ports = {port["port"] for rule in allowed(policies, labels, "egress") for port in rule.get("ports", [])}
    assert ports >= {8888, 53}


def test_what_the_upload_runs_puts_the_pipelines_there(
    objects: tuple[Object, ...], kubeflow: fake.Kubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own command, environment and mounted file, against the stand-in of Kubeflow's API."""
    (template,) = pod_templates(upload(objects))
    (container,) = template["spec"]["containers"]
    (file,) = [each["data"]["deployment.yaml"] for each in objects if name(each) == "ConfigMap/k2-deployment"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    (mount,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "deployment"]
    assert variables["K2_DEPLOYMENT"] == f"{mount}/deployment.yaml"
    (tmp_path / "deployment.yaml").write_text(file)
    monkeypatch.setenv("K2_DEPLOYMENT", str(tmp_path / "deployment.yaml"))
    program, *arguments = container["command"]
    done = CliRunner().invoke(main, arguments)
    assert (program, done.exit_code) == ("k2", 0), done.output
    assert sorted(row["display_name"] for row in kubeflow.rows("pipelines")) == ["k2", "k2-retrain"]
