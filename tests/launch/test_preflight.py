"""What a deployment needs and its cluster lacks: found by the first step and by submit, before anything is created."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from k2.cli import main
from k2.config.deployment import Deployment
from k2.errors import StageError, UserError
from k2.execution.component import resolve_config
from k2.launch.cluster import Cluster
from k2.launch.preflight import require
from k2.platform.needs import LAUNCHER, of_deployment
from k2.platform.pods import CREDENTIALS, NEEDS_VARIABLE, STORE_KEYS
from tests.launch.conftest import CORE, DEPLOYMENT
from tests.launch.fake_kubernetes import Failure, FakeKubernetes
from tests.platform import fake_kubeflow

NAMED = DEPLOYMENT | {
    "pull_secrets": ["registry"],
    "secrets": {"K2_LLM_API_KEY": {"secret": "llm", "key": "api-key", "stages": ["rephrase"]}},
    "network": {"ca_config_map": "ca"},
    "stages": {"pretrain": "gpus", "tokenize": "job"},
    "sandbox": {"runtime_class": "gvisor"},
}
THERE = (
    (f"{CORE}/secrets", "registry", ()),
    (f"{CORE}/secrets", "llm", ("api-key",)),
    (f"{CORE}/configmaps", "ca", ("ca.crt",)),
    ("/apis/node.k8s.io/v1/runtimeclasses", "gvisor", ()),
    ("/apis/kueue.x-k8s.io/v1beta2/namespaces/ml/localqueues", "k2-gpu", ()),
    ("/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes", "k2-torch-gpu", ()),
)
"""Where, name, keys: all that `NAMED` names, and the store's Secret, which the server has already."""


@pytest.fixture
def deployment() -> Deployment:
    return Deployment.model_validate(NAMED)


@pytest.fixture
def complete(kubernetes: FakeKubernetes) -> FakeKubernetes:
    """A cluster that has all of it."""
    for path, name, keys in THERE:
        kubernetes.add(path, {"metadata": {"name": name}, "data": dict.fromkeys(keys, "eA==")})
    return kubernetes


def refused(cluster: Cluster, deployment: Deployment) -> str:
    with pytest.raises(UserError) as refusal:
        require(cluster, of_deployment(deployment))
    return str(refusal.value)


def test_what_has_everything_is_let_pass(complete: FakeKubernetes, cluster: Cluster, deployment: Deployment) -> None:
    require(cluster, of_deployment(deployment))


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (
            f"{CORE}/secrets/k2-s3",
            "Secret k2-s3: there is none in ml, and store.secret names it; `kubectl create secret`",
        ),
        (f"{CORE}/secrets/registry", "Secret registry: there is none in ml, and pull_secrets names it"),
        (f"{CORE}/secrets/llm", "Secret llm: there is none in ml, and secrets.K2_LLM_API_KEY names it"),
        (f"{CORE}/configmaps/ca", "ConfigMap ca: there is none in ml, and network.ca_config_map names it"),
        (THERE[3][0] + "/gvisor", "RuntimeClass gvisor: there is none, and sandbox.runtime_class names it"),
        (THERE[4][0] + "/k2-gpu", "LocalQueue k2-gpu: there is none in ml, and pools.gpus.queue names it"),
        (THERE[5][0] + "/k2-torch-gpu", "ClusterTrainingRuntime k2-torch-gpu: there is none, and pools.gpus.runtime"),
    ],
)
def test_each_thing_is_missed_by_its_field(
    path: str, problem: str, complete: FakeKubernetes, cluster: Cluster, deployment: Deployment
) -> None:
    complete.remove(path)
    assert refused(cluster, deployment).startswith(problem)


def test_a_key_is_missed_too(complete: FakeKubernetes, cluster: Cluster, deployment: Deployment) -> None:
    complete.objects[f"{CORE}/secrets/k2-s3"]["data"].pop("K2_S3_BUCKET")
    problem = "Secret k2-s3: has no K2_S3_BUCKET, which store.secret needs; add what is missing"
    assert refused(cluster, deployment) == problem


@pytest.mark.parametrize(
    ("api", "problem"),
    [
        ("trainer.kubeflow.org/v1alpha1", "pools.gpus.launch: nothing serves trainer.kubeflow.org/v1alpha1; install"),
        ("kueue.x-k8s.io/v1beta2", "pools.gpus.queue: nothing serves kueue.x-k8s.io/v1beta2; install Kueue, or"),
    ],
)
def test_a_missing_crd(
    api: str, problem: str, complete: FakeKubernetes, cluster: Cluster, deployment: Deployment
) -> None:
    complete.served.remove(api)
    assert refused(cluster, deployment).startswith(problem)


@pytest.mark.parametrize(("group", "resource", "verbs"), LAUNCHER)
def test_a_missing_verb(
    group: str, resource: str, verbs: tuple[str, ...], complete: FakeKubernetes, cluster: Cluster
) -> None:
    """Of any right that a launcher uses; services are for jobs of several nodes."""
    complete.denied = {(verbs[-1], resource)}
    everything = NAMED | {"stages": {"pretrain": "pair", "sft": "single", "tokenize": "job"}}
    everything["pools"] = NAMED["pools"] | {"single": NAMED["pools"]["gpus"] | {"nodes": 1}}
    name = f"{resource}.{group}" if group else resource
    said = refused(cluster, Deployment.model_validate(everything))
    assert said == f"may {name} in ml: missing: {verbs[-1]}; the Role k2-launcher grants them"


def test_what_credentials_may_not_look_at_is_said(
    complete: FakeKubernetes, cluster: Cluster, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    complete.forbidden = {"secrets"}
    require(cluster, of_deployment(deployment))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Secret k2-s3",
        "Secret llm",
        "Secret registry",
    ]
    assert "these credentials may not look for it (pull_secrets); with the verb get on secrets" in caplog.text


def test_a_deployment_of_pods_alone_needs_no_right_and_no_operator(
    kubernetes: FakeKubernetes, cluster: Cluster
) -> None:
    kubernetes.served, kubernetes.denied = [], {(verb, row[1]) for row in LAUNCHER for verb in row[2]}
    plain = Deployment.model_validate(DEPLOYMENT | {"stages": {}, "queues": {}, "pools": {"light": {}}})
    require(cluster, of_deployment(plain))
    assert [path for _, path in kubernetes.requests] == ["/apis/", f"{CORE}/secrets/k2-s3"]


# The first step of a run.


@pytest.fixture
def first_step(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the step `configure` in a pod of a cluster."""
    monkeypatch.setenv(NEEDS_VARIABLE, of_deployment(deployment).model_dump_json(exclude_defaults=True))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    for name in (*STORE_KEYS, *CREDENTIALS):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr(Cluster, "connect", lambda patience_s, connect=Cluster.connect: connect("ml", patience_s))


@pytest.mark.usefixtures("first_step")
def test_the_first_step_ends_where_something_is_missing(
    complete: FakeKubernetes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nano" in resolve_config("nano", "", "r")
    complete.remove(f"{CORE}/secrets/llm")
    with pytest.raises(SystemExit) as end:
        resolve_config("nano", "", "r")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: Secret llm: there is none in ml, and secrets.K2_LLM_API_KEY")
    monkeypatch.setattr("k2.execution.component.CHECK_S", 0.0)
    complete.failures.append(Failure("GET", "/apis/", 503, times=9))
    with pytest.raises(SystemExit) as end:
        resolve_config("nano", "", "r")
    assert end.value.code == 1
    assert "HTTP 503: injected" in capsys.readouterr().err


@pytest.mark.usefixtures("first_step")
def test_the_first_step_misses_its_own_variables_where_it_may_not_look(
    complete: FakeKubernetes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete.forbidden = {"secrets"}
    monkeypatch.delenv("K2_S3_BUCKET")
    with pytest.raises(SystemExit):
        resolve_config("nano", "", "r")
    said = "error: store.secret: the Secret that it names is not there, or has no K2_S3_BUCKET\n"
    assert capsys.readouterr().err.endswith(said)


# Submit.


def submitted(folder: Path, *options: str, **changes: Any) -> tuple[int, str, int]:
    """Exit code, what was said, and runs that were made, of a Kubeflow that has the pipeline."""
    document = NAMED | {"kubeflow": {"namespace": "ml"}} | changes
    (folder / "d.yaml").write_text(yaml.safe_dump(document))
    deployed = ["--deployment", str(folder / "d.yaml")]
    with fake_kubeflow.serve(fake_kubeflow.Kubeflow()) as kubeflow:
        environment = {"KF_PIPELINES_ENDPOINT": kubeflow.url, "KF_PIPELINES_SA_TOKEN_PATH": "/nonexistent/token"}
        uploaded = CliRunner().invoke(main, ["pipeline", "upload", *deployed, "--pipeline", "k2"], env=environment)
        assert uploaded.exit_code == 0, uploaded.output
        done = CliRunner().invoke(main, ["pipeline", "submit", *deployed, *options], env=environment)
        return done.exit_code, done.stderr, len(kubeflow.rows("runs"))


def test_submit_refuses_what_the_cluster_lacks(complete: FakeKubernetes, tmp_path: Path) -> None:
    complete.denied = {("create", "jobs")}  # Of whoever submits, who is not the launcher.
    assert submitted(tmp_path)[::2] == (0, 1)
    complete.remove(f"{CORE}/secrets/k2-s3")
    code, said, runs = submitted(tmp_path)
    assert (code, runs) == (2, 0)
    assert said.startswith("error: Secret k2-s3: there is none in ml, and store.secret names it")
    assert submitted(tmp_path, "--no-check")[::2] == (0, 1)


def test_submit_says_when_it_cannot_look(
    complete: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete.failures.append(Failure("GET", "/apis/", 0, times=9))
    code, said, runs = submitted(tmp_path)
    assert (code, runs) == (2, 0)
    assert "; `--no-check` submits without looking at kubectl's cluster" in said
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nothing"))
    assert submitted(tmp_path)[::2] == (0, 1)


def test_a_cluster_that_does_not_answer_is_an_error_of_its_own(
    kubernetes: FakeKubernetes, cluster: Cluster, deployment: Deployment
) -> None:
    kubernetes.shutdown()
    kubernetes.server_close()
    cluster.patience_s = 0.0
    with pytest.raises(StageError, match=r"http://127.0.0.1:\d+: NewConnectionError$"):
        require(cluster, of_deployment(deployment))
