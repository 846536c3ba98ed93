"""The step that launches: one job for one result, followed to its end, whatever the API server does meanwhile."""

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from k2.config.deployment import Placement
from k2.config.tokenize import TokenizeConfig
from k2.errors import StageError, UserError
from k2.execution.runner import execute
from k2.launch.cluster import Cluster
from k2.launch.launcher import Launcher, Times
from k2.launch.work import Work
from k2.store.artifacts import Artifact
from k2.store.client import Store
from tests.conftest import SilentProgress
from tests.launch.conftest import placement
from tests.launch.fake_kubernetes import FakeKubernetes, Kubelet

FAST = Times(poll_s=0.02, flush_s=0.1, admission_s=0.3, deletion_s=2.0)
KEY = "0" * 64
WORK = Work(run="nightly 1", stage="tokenize", config={}, inputs={}, key=KEY)
JOBS = "/apis/batch/v1/namespaces/ml/jobs"
WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/ml/workflows"
WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/namespaces/ml/workloads"
NAME = "k2-tokenize-0000000000-1"
Make = Callable[..., Artifact]


def documents(count: int, text: str) -> bytes:
    rows = [{"id": str(i), "text": f"{text} {i} jumps.", "domain": "web", "source": "test"} for i in range(count)]
    return zstandard.compress("\n".join(json.dumps(row) for row in rows).encode())


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


class Run:
    """A launcher in a thread, and what became of it."""

    def __init__(self, launcher: Launcher, work: Work = WORK) -> None:
        self.artifact: Artifact | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(launcher, work), daemon=True)
        self._thread.start()

    def _run(self, launcher: Launcher, work: Work) -> None:
        try:
            self.artifact = launcher.run(work)
        except (UserError, StageError) as error:
            self.error = error

    def end(self) -> "Run":
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self


@pytest.fixture
def launcher(cluster: Cluster, store: Store, progress: SilentProgress) -> Callable[..., Launcher]:
    def make(here: Placement | None = None, patience_s: float = 5.0) -> Launcher:
        cluster.patience_s = patience_s
        return Launcher(cluster, here or placement("tokenize"), store, progress, FAST)

    return make


@pytest.fixture
def owned(kubernetes: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`owned(run)`: from now on this process is a step of that workflow, which runs."""

    def make(run: str) -> None:
        if f"{WORKFLOWS}/{run}" not in kubernetes.objects:
            kubernetes.add(WORKFLOWS, {"metadata": {"name": run}, "status": {"phase": "Running"}})
        uid = kubernetes.objects[f"{WORKFLOWS}/{run}"]["metadata"]["uid"]
        owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": run, "uid": uid, "controller": True}
        pod = {"metadata": {"name": f"{run}-step", "ownerReferences": [owner]}, "spec": {}}
        kubernetes.add("/api/v1/namespaces/ml/pods", pod)
        monkeypatch.setenv("K2_POD_NAME", f"{run}-step")

    return make


def kinds(progress: SilentProgress) -> list[str]:
    return [event["kind"] for event in progress.events]


def test_a_stage_is_made_by_a_job_and_its_result_returned(
    kubernetes: FakeKubernetes, store: Store, progress: SilentProgress, make_artifact: Make,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], owned: Callable[[str], None],
) -> None:  # fmt: skip
    """The whole way: a step with K2_LAUNCH, the API server, a pod that runs for real, the object store."""
    owned("k2-abcde")
    kubernetes.kubelet = Kubelet({"K2_S3_PREFIX": store.prefix, "HOME": os.environ["HOME"], "TMPDIR": "/tmp"})
    kubernetes.kubelet.environment["K2_HOME"] = os.environ["K2_HOME"]
    monkeypatch.setenv("K2_LAUNCH", placement("tokenize").model_dump_json(exclude_defaults=True))
    monkeypatch.setattr("k2.launch.launcher.POLL_S", 0.1)
    monkeypatch.setattr("k2.launch.cluster.NAMESPACE_FILE", _file(monkeypatch, "ml"))
    inputs = {
        "documents": make_artifact("rephrase", {"documents.jsonl.zst": documents(20, "the quick brown fox")}),
        "heldout": make_artifact("ingest", {"heldout.jsonl.zst": documents(3, "a slow dog")}),
    }
    outcome = execute("tokenize", TokenizeConfig(vocab_size=512), inputs, store, progress, "nightly 1")
    assert "train/tokens.npy" in outcome.artifact.files
    assert not outcome.cached
    (job,) = kubernetes.of("jobs")
    assert job["metadata"]["ownerReferences"][0]["kind"] == "Workflow"
    assert job["metadata"]["labels"]["k2.dev/run"] == "nightly-1"
    assert kinds(progress)[0] == "job_created"
    assert '"kind":"progress"' in capsys.readouterr().err
    (log,) = [info.name for info in store.list("runs/nightly 1/logs/tokenize/")]
    assert b"progress" in (store.get(log) or b"")

    again = execute("tokenize", TokenizeConfig(vocab_size=512), inputs, store, progress, "nightly 2")
    assert again.cached
    assert len(kubernetes.of("jobs")) == 1


def _file(monkeypatch: pytest.MonkeyPatch, text: str) -> Any:
    import tempfile
    from pathlib import Path

    file = Path(tempfile.mkdtemp()) / "namespace"
    file.write_text(text)
    return file
