"""Pods of sandboxes on a server that keeps objects; that they run is tested on a real Kubernetes (tests/e2e_k8s)."""

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from k2.cli import main
from k2.config.deployment import Deployment
from k2.errors import StageError, UserError
from k2.launch.cluster import Cluster, ClusterError
from k2.sandbox.contract import Limits
from k2.sandbox.pod import FILES_BYTES, PodSandbox
from tests.launch.conftest import DEPLOYMENT, kubernetes
from tests.launch.fake_kubernetes import Failure, FakeKubernetes
from tests.manifests.render import assert_restricted, validate

__all__ = ["kubernetes"]
PODS, CONFIG_MAPS = "/api/v1/namespaces/ml/pods", "/api/v1/namespaces/ml/configmaps"
DONE = {"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]}


def sandbox(*, start_s: float = 30.0, **where: Any) -> PodSandbox:
    deployment = Deployment.model_validate(DEPLOYMENT | {"pull_secrets": ["registry"], "sandbox": where})
    return PodSandbox(Cluster.connect("ml", patience_s=2.0), deployment, poll_s=0.02, start_s=start_s)


@pytest.fixture
def node(kubernetes: FakeKubernetes) -> Iterator[dict[str, Any]]:
    """Ends every pod with its `status` once its files are there; keeps what was asked for in `pod` and `files`."""
    seen: dict[str, Any] = {"status": DONE, "pod": None, "files": None}
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.01):
            for path, thing in list(kubernetes.objects.items()):
                files = kubernetes.objects.get(path.replace("/pods/", "/configmaps/"))
                if "/pods/k2-sandbox-" in path and files and seen["status"]:
                    seen["pod"], seen["files"] = dict(thing), files
                    kubernetes.logs.setdefault(path.rpartition("/")[2], [("2026", "written")])
                    thing["status"] = seen["status"]

    thread = threading.Thread(target=follow)
    thread.start()
    yield seen
    ended.set()
    thread.join()


def left(kubernetes: FakeKubernetes) -> list[str]:
    return [path for path in kubernetes.objects if path.startswith(PODS)]


def ended(why: str = "", said: str = "", /, **terminated: Any) -> dict[str, Any]:
    told = {"phase": "Failed", "reason": why, "message": said}
    return told | {"containerStatuses": [{"state": {"terminated": terminated}}]}


def test_the_pod_is_restricted_and_goes_with_its_files(kubernetes: FakeKubernetes, node: dict[str, Any]) -> None:
    place = {"runtime_class": "gvisor", "node_labels": {"pool": "sandbox"}, "tolerations": [{"key": "sandbox"}]}
    result = sandbox(**place).run(["python", "a/main.py", "$(X)"], {"a/main.py": b"\xff"}, Limits(wall_s=2.5))
    assert (result.exit_code, result.output, result.exceeded) == (0, "2026 written\n", "")
    pod, spec = node["pod"], node["pod"]["spec"]
    assert_restricted(pod)
    validate({field: value for field, value in pod.items() if field != "status"})
    assert spec["runtimeClassName"] == "gvisor"
    assert spec["tolerations"] == [{"key": "sandbox", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["automountServiceAccountToken"] is False
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "sandbox"
    assert pod["metadata"]["labels"]["k2.dev/team"] == "ml"
    (container,) = spec["containers"]
    assert "env" not in container
    assert container["command"][-3:] == ["python", "a/main.py", "$$(X)"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert node["files"]["binaryData"] == {"file-0": "/w=="}
    assert spec["volumes"][0]["configMap"]["items"] == [{"key": "file-0", "path": "a/main.py"}]
    (owner,) = node["files"]["metadata"]["ownerReferences"]
    assert owner["uid"] == pod["metadata"]["uid"]
    assert left(kubernetes) == []


def test_the_pod_says_who_pays_and_which_run_and_preset(
    kubernetes: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-a", "uid": "u"}
    kubernetes.add(PODS, {"metadata": {"name": "step", "ownerReferences": [workflow]}, "spec": {}})
    monkeypatch.setenv("K2_POD_NAME", "step")
    pinned = Deployment.model_validate(DEPLOYMENT | {"preset": "small", "sandbox": {}})
    pod = PodSandbox(Cluster.connect("ml"), pinned).pod("s", ["true"], {}, Limits())
    expected = {"k2.dev/team": "ml", "k2.dev/run": "run-a", "k2.dev/preset": "small"}
    assert pod["metadata"]["labels"].items() >= expected.items()


@pytest.mark.parametrize(
    ("status", "exceeded"),
    [
        (ended(exitCode=137, reason="OOMKilled"), "memory"),
        (ended(exitCode=137, reason="Error", message="time"), "time"),
        (ended(exitCode=137, reason="Error", message="output"), "output"),
        (ended(exitCode=1, reason="Error", message="of the program's own"), ""),
        (ended("DeadlineExceeded"), "time"),
        (ended("Evicted", "Usage of EmptyDir volume: emptyDir exceeds the limit"), "disk"),
    ],
)
def test_the_limit_that_ended_it_is_named(
    kubernetes: FakeKubernetes, node: dict[str, Any], status: Mapping[str, Any], exceeded: str
) -> None:
    node["status"] = status
    assert sandbox().run(["true"], {}, Limits()).exceeded == exceeded
    assert left(kubernetes) == []


def test_a_pod_that_ends_for_a_reason_of_the_node_has_no_result(
    kubernetes: FakeKubernetes, node: dict[str, Any]
) -> None:
    node["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    with pytest.raises(StageError, match="low on resource"):
        sandbox().run(["true"], {}, Limits())
    assert left(kubernetes) == []


def test_a_pod_that_does_not_start_is_deleted_and_says_what_it_waits_for(
    kubernetes: FakeKubernetes, node: dict[str, Any]
) -> None:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "denied"}}
    node["status"] = {"phase": "Pending", "containerStatuses": [{"state": waiting}]}
    with pytest.raises(StageError, match="still Pending: ImagePullBackOff: denied"):
        sandbox(start_s=1.0).run(["true"], {}, Limits())
    assert left(kubernetes) == []


def test_without_the_right_to_bring_files_no_pod_stays(kubernetes: FakeKubernetes) -> None:
    kubernetes.failures.append(Failure("POST", CONFIG_MAPS, 403))
    with pytest.raises(ClusterError, match="403"):
        sandbox().run(["true"], {"f": b""}, Limits())
    assert left(kubernetes) == []


def test_a_lost_answer_makes_no_second_pod(kubernetes: FakeKubernetes, node: dict[str, Any]) -> None:
    kubernetes.failures.append(Failure("POST", PODS, 0, after=True))
    patient = Cluster.connect("ml", patience_s=5)
    deployment = Deployment.model_validate(DEPLOYMENT | {"sandbox": {}})
    assert PodSandbox(patient, deployment, poll_s=0.02).run(["true"], {}, Limits()).exit_code == 0
    assert left(kubernetes) == []


def test_a_pod_that_somebody_deletes_is_no_result(kubernetes: FakeKubernetes, node: dict[str, Any]) -> None:
    node["status"] = {"phase": "Running"}

    def remove() -> None:
        while not left(kubernetes):
            time.sleep(0.01)
        time.sleep(0.2)
        kubernetes.objects.pop(left(kubernetes)[0])

    thread = threading.Thread(target=remove)
    thread.start()
    with pytest.raises(StageError, match="deleted before it ended"):
        sandbox().run(["true"], {}, Limits())
    thread.join()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "..data", ""])
def test_files_stay_inside(kubernetes: FakeKubernetes, name: str) -> None:
    with pytest.raises(UserError, match="leads out"):
        sandbox().run(["true"], {name: b""}, Limits())
    assert kubernetes.requests == []


def test_too_many_bytes_are_refused_before_anything_is_made(kubernetes: FakeKubernetes) -> None:
    with pytest.raises(UserError, match=str(FILES_BYTES)):
        sandbox().run(["true"], {"f": bytes(FILES_BYTES + 1)}, Limits())
    assert kubernetes.requests == []


def test_the_deployment_file_has_to_say_where(kubernetes: FakeKubernetes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sandbox"):
        PodSandbox(Cluster.connect("ml"), Deployment.model_validate(DEPLOYMENT))
    with pytest.raises(ValueError, match=r"sandbox\.image: there is no image 'other'"):
        sandbox(image="other")
    (tmp_path / "p.py").write_text("print(1)")
    (tmp_path / "d.yaml").write_text(str(DEPLOYMENT).replace("'", '"'))
    command = ["sandbox", "--deployment", str(tmp_path / "d.yaml"), str(tmp_path / "p.py")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2, result.output
    assert "sandbox" in result.output
