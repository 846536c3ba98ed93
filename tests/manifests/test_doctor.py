"""`k2 doctor --cluster` against an API server on loopback that knows groups, objects, rights and impersonation."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from k2.cli import main
from k2.commands import doctor
from k2.platform.needs import LAUNCHER, SANDBOX, Rights
from k2.platform.pods import CREDENTIALS, STORE_KEYS
from tests.manifests.render import ROOT, kustomize

STORE = (*STORE_KEYS, *CREDENTIALS)
RUNNER = "system:serviceaccount:kubeflow:pipeline-runner"


class Cluster(ThreadingHTTPServer):
    """rules: user -> RBAC rules; objects: path -> keys of what is there; hidden: paths that nobody may read."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.groups = ["batch/v1", "node.k8s.io/v1", *doctor.OPERATORS]
        self.rules: dict[str, list[dict[str, Any]]] = {}
        self.objects: dict[str, tuple[str, ...]] = {}
        self.hidden: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    """The four requests that the doctor makes."""

    server: Cluster

    def do_GET(self) -> None:
        if self.path == "/version/":
            self.answer(version())
        elif self.path == "/apis/":
            self.answer(groups(self.server.groups))
        elif self.path in self.server.hidden:
            self.answer({}, 403)
        else:
            keys = self.server.objects.get(self.path)
            self.answer({"data": dict.fromkeys(keys or (), "eA==")}, 404 if keys is None else 200)

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = self.headers.get("Impersonate-User", "me")
        wanted = review["spec"]["resourceAttributes"]
        allowed = any(grants(rule, wanted) for rule in self.server.rules.get(user, []))
        self.answer(review | {"status": {"allowed": allowed}}, 201)

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def version() -> dict[str, str]:
    names = "buildDate compiler gitCommit gitTreeState goVersion major minor platform"
    return dict.fromkeys(names.split(), "x") | {"gitVersion": "v1.36.2"}


def groups(served: list[str]) -> dict[str, Any]:
    rows = []
    for each in served:
        found = {"groupVersion": each, "version": each.partition("/")[2]}
        rows.append({"name": each.partition("/")[0], "versions": [found], "preferredVersion": found})
    return {"groups": rows}


def grants(rule: dict[str, Any], wanted: dict[str, str]) -> bool:
    resource = "/".join(filter(None, [wanted["resource"], wanted.get("subresource", "")]))
    return (
        wanted.get("group", "") in rule["apiGroups"]
        and resource in rule["resources"]
        and wanted["verb"] in rule["verbs"]
        and wanted["namespace"] == "kubeflow"
    )


def launcher_rules(role: str = "k2-launcher", overlay: str = "prod") -> list[dict[str, Any]]:
    objects = kustomize(f"manifests/overlays/{overlay}")
    roles = {each["metadata"]["name"]: each for each in objects if each["kind"] == "Role"}
    rules: list[dict[str, Any]] = json.loads(json.dumps(roles[role]["rules"]))
    return rules


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    server = Cluster()
    server.rules[RUNNER] = launcher_rules()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    config = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    monkeypatch.setattr(doctor, "machine", dict)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def diagnose(*arguments: str) -> tuple[int, dict[str, tuple[str, str]], str]:
    result = CliRunner().invoke(main, ["doctor", "--cluster", "--json", *arguments])
    rows = json.loads(result.stdout)["cluster"] if result.stdout.startswith("{") else []
    return result.exit_code, {row["check"]: (row["state"], row["detail"]) for row in rows}, result.output


def test_a_cluster_that_has_all_it_needs(cluster: Cluster) -> None:
    code, found, output = diagnose("--account", "pipeline-runner")
    assert code == 0, output
    assert found["Kubernetes"][1].startswith("v1.36.2 at http://127.0.0.1:")
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["delivery"][1].startswith("database")


def test_the_missing_verb_is_named(cluster: Cluster) -> None:
    for rule in cluster.rules[RUNNER]:
        if "trainjobs" in rule["resources"]:
            rule["verbs"] = [verb for verb in rule["verbs"] if verb not in ("list", "delete")]
    code, found, _ = diagnose("--account", "pipeline-runner")
    assert code == 1
    state, detail = found["may trainjobs.trainer.kubeflow.org in kubeflow"]
    assert (state, detail.partition(";")[0]) == ("failed", "missing: delete, list")
    assert [name for name, (state, _) in found.items() if state == "failed"] == [
        "may trainjobs.trainer.kubeflow.org in kubeflow"
    ]


def test_without_an_account_ones_own_rights_count(cluster: Cluster) -> None:
    code, found, _ = diagnose()
    assert code == 1
    assert found["may pods/log in kubeflow"][0] == "failed"


def test_what_no_operator_serves_is_absent_and_its_verbs_are_not_asked_for(cluster: Cluster) -> None:
    cluster.groups = ["batch/v1", doctor.NATIVE]
    cluster.rules[RUNNER] = [rule for rule in cluster.rules[RUNNER] if rule["apiGroups"] in ([""], ["batch"])]
    code, found, output = diagnose("--account", "pipeline-runner")
    assert code == 0, output
    assert found["kueue.x-k8s.io/v1beta2"][0] == "absent"
    assert not [name for name in found if "trainjobs" in name]
    assert found["delivery"][1].startswith("Kubernetes-native")


def test_names_of_a_deployment_file_are_looked_up(cluster: Cluster) -> None:
    base = "/api/v1/namespaces/kubeflow"
    cluster.objects = {f"{base}/secrets/k2-s3": STORE, f"{base}/configmaps/cluster-ca": ("other.crt",)}
    cluster.hidden = {f"{base}/secrets/llm-endpoint"}
    deployment = str(ROOT / "pipelines" / "deployments" / "gpu.yaml")
    code, found, _ = diagnose("--account", "pipeline-runner", "--deployment", deployment)
    names = ("Secret", "ConfigMap", "LocalQueue", "ClusterTrainingRuntime")
    states = {name: found[name][0] for name in found if name.split()[0] in names}
    assert code == 1
    assert states == {
        "Secret k2-s3": "ok",
        "Secret registry": "failed",
        "Secret llm-endpoint": "unknown",
        "ConfigMap cluster-ca": "failed",
        "LocalQueue k2-gpu": "failed",
        "ClusterTrainingRuntime k2-torch-gpu": "failed",
    }
    problems = {name: found[name][1] for name, state in states.items() if state == "failed"}
    assert problems["Secret registry"].startswith(
        "there is none in kubeflow, and pull_secrets names it; `kubectl create"
    )
    assert problems["LocalQueue k2-gpu"].endswith(
        "pools.gpu.queue names it; manifests/components/kueue has queues, or name another"
    )
    assert problems["ClusterTrainingRuntime k2-torch-gpu"].startswith("there is none, and pools.gpu.runtime names it")
    assert problems["ConfigMap cluster-ca"].startswith("has no ca.crt, which network.ca_config_map needs")
    assert "these credentials may not look for it (secrets.K2_LLM_API_KEY)" in found["Secret llm-endpoint"][1]


def test_an_operator_that_a_pool_needs_is_missed(cluster: Cluster) -> None:
    cluster.groups = ["batch/v1"]
    deployment = str(ROOT / "pipelines" / "deployments" / "gpu.yaml")
    code, found, _ = diagnose("--account", "pipeline-runner", "--deployment", deployment)
    assert code == 1
    state, detail = found["pools.gpu.launch"]
    assert (state, detail.partition(";")[0]) == ("failed", "nothing serves trainer.kubeflow.org/v1alpha1")
    assert found["pools.gpu.queue"][0] == "failed"
    assert found["pools.gpu.queue"][1].endswith("install Kueue, or remove the queue")


def test_a_cluster_that_does_not_answer_is_one_line(cluster: Cluster) -> None:
    cluster.shutdown()
    cluster.server_close()
    code, _, output = diagnose()
    assert code == 2
    assert len(output.strip().splitlines()) == 1
    assert "error: http://127.0.0.1" in output


def test_no_credentials_is_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "machine", dict)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nothing"))
    code, _, output = diagnose()
    assert code == 2
    assert "KUBECONFIG" in output


def test_sandboxes_need_rights_and_a_runtime_class_that_is_there(cluster: Cluster, tmp_path: Path) -> None:
    deployment = yaml.safe_load((ROOT / "manifests" / "overlays" / "dev" / "deployment.yaml").read_text())
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(deployment | {"sandbox": {"runtime_class": "gvisor"}}))
    asked = ("--account", "pipeline-runner", "--deployment", str(tmp_path / "d.yaml"))
    code, found, output = diagnose(*asked)
    assert code == 1
    assert found["may configmaps in kubeflow"] == ("failed", "missing: create; the Role k2-sandbox grants them")
    assert found["RuntimeClass gvisor"][0] == "failed"
    cluster.rules[RUNNER] += launcher_rules("k2-sandbox", "dev")
    cluster.objects = {"/api/v1/namespaces/kubeflow/secrets/k2-s3": STORE}
    cluster.objects["/apis/node.k8s.io/v1/runtimeclasses/gvisor"] = ()
    code, found, output = diagnose(*asked)
    assert code == 0, output
    assert found["RuntimeClass gvisor"][0] == "ok"


@pytest.mark.parametrize(
    ("role", "overlay", "needed"), [("k2-launcher", "prod", LAUNCHER), ("k2-sandbox", "dev", SANDBOX)]
)
def test_a_role_grants_exactly_what_the_doctor_asks_for(role: str, overlay: str, needed: Rights) -> None:
    granted = {
        (group, resource, verb)
        for rule in launcher_rules(role, overlay)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == {(group, resource, verb) for group, resource, verbs in needed for verb in verbs}
