"""The step that launches: one job for one result, followed to its end, whatever the API server does meanwhile."""

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from k2.config.deployment import Budget, Placement
from k2.config.tokenize import TokenizeConfig
from k2.errors import StageError, UserError
from k2.execution.runner import execute
from k2.launch.cluster import Cluster
from k2.launch.launcher import Launcher, Times, owner
from k2.launch.work import Work
from k2.monitoring.run_record import write_stage_record
from k2.store.artifacts import Artifact
from k2.store.client import Store
from tests.conftest import SilentProgress
from tests.launch.conftest import CORE, placement
from tests.launch.fake_kubernetes import REVIEWS, Failure, FakeKubernetes, Kubelet

FAST = Times(poll_s=0.02, flush_s=0.1, admission_s=30.0, deletion_s=10.0)
KEY = "0" * 64
WORK = Work(run="nightly 1", stage="tokenize", config={}, inputs={}, key=KEY)
JOBS = "/apis/batch/v1/namespaces/ml/jobs"
TRAIN_JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/ml/trainjobs"
WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/ml/workflows"
WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/namespaces/ml/workloads"
NAME = "k2-tokenize-0000000000-1"
Make = Callable[..., Artifact]


def documents(count: int, text: str) -> bytes:
    rows = [{"id": str(i), "text": f"{text} {i} jumps.", "domain": "web", "source": "test"} for i in range(count)]
    return zstandard.compress("\n".join(json.dumps(row) for row in rows).encode())


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
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
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self


@pytest.fixture
def launcher(cluster: Cluster, store: Store, progress: SilentProgress) -> Callable[..., Launcher]:
    def make(here: Placement | None = None, patience_s: float = 5.0, times: Times = FAST) -> Launcher:
        cluster.patience_s = patience_s
        return Launcher(cluster, here or placement("tokenize"), store, progress, times)

    return make


@pytest.fixture
def owned(kubernetes: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`owned(run)`: from now on this process is a step of that workflow, which runs."""

    def make(run: str) -> None:
        if f"{WORKFLOWS}/{run}" not in kubernetes.objects:
            kubernetes.add(WORKFLOWS, {"metadata": {"name": run}, "status": {"phase": "Running"}})
        pod = {"metadata": {"name": f"{run}-step", "ownerReferences": [owner_of_run(kubernetes, run)]}, "spec": {}}
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
    outcome = execute("tokenize", TokenizeConfig(vocab_size=512), inputs, store, progress, "nightly 1", "nano")
    assert "train/index.json" in outcome.artifact.files
    assert not outcome.cached
    (job,) = kubernetes.of("jobs")
    assert job["metadata"]["ownerReferences"][0]["kind"] == "Workflow"
    pod = job["spec"]["template"]["metadata"]
    for labels in (job["metadata"]["labels"], pod["labels"]):
        assert (labels["k2.dev/run"], labels["k2.dev/preset"]) == ("k2-abcde", "nano")
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


def job_of(launcher: Launcher, attempt: int = 1, work: Work = WORK) -> dict[str, Any]:
    """The job that this launcher would make."""
    return launcher._job(work, attempt, owner(launcher.cluster))


def finish(kubernetes: FakeKubernetes, make_artifact: Make, store: Store, name: str = NAME) -> None:
    """The job publishes its artifact and is complete."""
    made = make_artifact("tokenize", {"a": b"1"})
    body = store.get(f"tokenize/{made.key}/manifest.json")
    assert body
    store.put(f"tokenize/{KEY}/manifest.json", body)
    kubernetes.status(name, conditions=[{"type": "Complete", "status": "True"}])


def created(kubernetes: FakeKubernetes, name: str = NAME) -> dict[str, Any]:
    found: dict[str, Any] = wait_for(
        lambda: [each for each in kubernetes.of("jobs") if each["metadata"]["name"] == name]
    )[0]
    return found


def test_the_job_is_owned_marked_and_limited(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], owned: Callable[[str], None],
    make_artifact: Make, store: Store,
) -> None:  # fmt: skip
    owned("run-a")
    run = Run(launcher())
    job = created(kubernetes)
    assert job["spec"]["activeDeadlineSeconds"] == 7200  # An hour of work, and one of waiting for nodes.
    assert (
        job["metadata"]["labels"].items()
        >= {"k2.dev/run": "run-a", "k2.dev/stage": "tokenize", "k2.dev/team": "ml"}.items()
    )
    assert job["metadata"]["labels"] == job["spec"]["template"]["metadata"]["labels"]
    finish(kubernetes, make_artifact, store)
    assert run.end().error is None
    assert run.artifact is not None
    kubernetes.remove(f"{WORKFLOWS}/run-a")
    assert kubernetes.of("jobs") == []


def test_a_step_that_is_run_again_adopts_its_live_job(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], owned: Callable[[str], None],
    make_artifact: Make, store: Store, progress: SilentProgress,
) -> None:  # fmt: skip
    owned("run-a")
    kubernetes.add(JOBS, job_of(launcher()) | {"metadata": owned_metadata(kubernetes, launcher())})
    run = Run(launcher())
    wait_for(lambda: "job_adopted" in kinds(progress))
    finish(kubernetes, make_artifact, store)
    assert run.end().artifact is not None
    assert ("POST", JOBS) not in kubernetes.requests


def owned_metadata(kubernetes: FakeKubernetes, launcher: Launcher, run: str = "run-a", **digest: str) -> dict[str, Any]:
    changed = {"annotations": {"k2.dev/spec-digest": digest["digest"]}} if digest else {}
    return job_of(launcher)["metadata"] | {"ownerReferences": [owner_of_run(kubernetes, run)]} | changed


def owner_of_run(kubernetes: FakeKubernetes, run: str) -> dict[str, str]:
    uid = str(kubernetes.objects[f"{WORKFLOWS}/{run}"]["metadata"]["uid"])
    return {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": run, "uid": uid}


@pytest.mark.parametrize("why", ["failed", "other spec", "complete without a result", "of a run that has ended"])
def test_a_job_that_is_of_no_use_is_deleted_and_made_anew(
    why: str, kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], owned: Callable[[str], None],
    make_artifact: Make, store: Store,
) -> None:  # fmt: skip
    owned("run-b")
    owned("run-a")
    metadata = owned_metadata(kubernetes, launcher())
    if why == "other spec":
        metadata = owned_metadata(kubernetes, launcher(), digest="of something else")
    if why == "of a run that has ended":
        metadata = owned_metadata(kubernetes, launcher(), "run-b")
        kubernetes.objects[f"{WORKFLOWS}/run-b"]["status"] = {"phase": "Failed"}
    kubernetes.add(JOBS, job_of(launcher()) | {"metadata": metadata})
    states = {"failed": "Failed", "complete without a result": "Complete"}
    if why in states:
        kubernetes.status(NAME, conditions=[{"type": states[why], "status": "True"}])
    run = Run(launcher())
    second = NAME.removesuffix("1") + "2"
    assert created(kubernetes, second)
    assert [job["metadata"]["name"] for job in kubernetes.of("jobs")] == [second]
    finish(kubernetes, make_artifact, store, second)
    assert run.end().artifact is not None


def test_what_a_live_run_makes_is_left_to_it(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], owned: Callable[[str], None]
) -> None:
    owned("run-b")
    metadata = owned_metadata(kubernetes, launcher(), "run-b")
    kubernetes.add(JOBS, job_of(launcher()) | {"metadata": metadata})
    owned("run-a")
    error = Run(launcher()).end().error
    assert isinstance(error, UserError)
    assert "run 'nightly-1' is making the same now; wait for it" in str(error)
    assert len(kubernetes.of("jobs")) == 1


@pytest.mark.parametrize("status", [0, 503])
@pytest.mark.parametrize(("method", "path"), [("GET", "jobs/"), ("POST", "jobs$"), ("GET", "log$"), ("GET", "pods$")])
def test_an_api_server_that_fails_for_a_while_changes_nothing(
    status: int, method: str, path: str, kubernetes: FakeKubernetes, launcher: Callable[..., Launcher],
    make_artifact: Make, store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("k2.launch.cluster.FIRST_DELAY_S", 0.01)
    kubernetes.failures.append(Failure(method, path, status, times=3))
    run = Run(launcher())
    pod = {"metadata": {"name": "p", "labels": {"job-name": NAME}}, "spec": {}}
    created(kubernetes)
    kubernetes.add("/api/v1/namespaces/ml/pods", pod)
    kubernetes.write("p", "hello")
    wait_for(lambda: kubernetes.failures[0].times == 0)
    finish(kubernetes, make_artifact, store)
    assert run.end().artifact is not None


def test_a_request_whose_answer_was_lost_does_not_make_a_second_job(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], make_artifact: Make, store: Store
) -> None:
    kubernetes.failures.append(Failure("POST", "jobs$", 504, after=True))
    run = Run(launcher())
    created(kubernetes)
    finish(kubernetes, make_artifact, store)
    assert run.end().artifact is not None
    assert len(kubernetes.of("jobs")) == 1


def test_an_api_server_that_stays_away_is_given_up(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]
) -> None:
    kubernetes.failures.append(Failure("GET", "jobs", 503, times=10**6))
    error = Run(launcher(patience_s=0.1)).end().error
    assert isinstance(error, StageError)
    assert "HTTP 503: injected, for 0.1 s" in str(error)


def test_a_missing_right_is_named_with_its_role(kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]) -> None:
    kubernetes.forbidden.add("jobs")
    error = Run(launcher()).end().error
    assert isinstance(error, StageError)
    assert "HTTP 403: jobs is forbidden; the Role k2-launcher grants" in str(error)


def test_a_failure_shows_the_end_of_the_log(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], store: Store
) -> None:
    run = Run(launcher())
    created(kubernetes)
    kubernetes.add("/api/v1/namespaces/ml/pods", {"metadata": {"name": "p", "labels": {"job-name": NAME}}, "spec": {}})
    secret = os.environ["K2_S3_SECRET_KEY"]
    kubernetes.write("p", "begin", f"RuntimeError: no such GPU, key {secret}")
    failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "too many"}
    kubernetes.status(NAME, conditions=[failed])
    error = str(run.end().error)
    assert (
        "the job failed (BackoffLimitExceeded: too many); its log ends with\nbegin\nRuntimeError: no such GPU, key ***"
        in error
    )
    (log,) = [info.name for info in store.list("runs/nightly 1/logs/")]
    assert store.get(log) == b"begin\nRuntimeError: no such GPU, key ***\n"


def test_a_job_that_somebody_deletes_ends_the_step(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]
) -> None:
    run = Run(launcher())
    created(kubernetes)
    kubernetes.remove(f"{JOBS}/{NAME}")
    assert "somebody deleted the job" in str(run.end().error)


def test_waiting_and_working_have_limits_of_their_own(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]
) -> None:
    run = Run(launcher(placement("tokenize", timeout_s=1)))
    created(kubernetes)
    kubernetes.status(NAME, active=1, ready=1)
    assert "still runs after 1 s; raise timeouts.stages.tokenize; the job is deleted" in str(run.end().error)
    assert kubernetes.of("jobs") == []

    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    pod = {
        "metadata": {"name": "p", "labels": {"job-name": NAME}},
        "spec": {},
        "status": {"conditions": [unschedulable]},
    }
    kubernetes.add("/api/v1/namespaces/ml/pods", pod)
    error = str(Run(launcher(placement("tokenize", queue_timeout_s=1))).end().error)
    assert "was pending for 1 s (Unschedulable: 0/3 nodes); raise timeouts.queue_hours; the job is deleted" in error


def test_a_missing_secret_is_said_after_a_minute_where_the_launcher_may_not_look_for_it(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]
) -> None:
    """It is then the pod that tells."""
    kubernetes.forbidden.add("secrets")
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "k2-s3" not found'}
    states = [{"state": {"waiting": waiting}}]
    pod = {"metadata": {"name": "p", "labels": {"job-name": NAME}}, "spec": {}, "status": {"containerStatuses": states}}
    kubernetes.add("/api/v1/namespaces/ml/pods", pod)
    error = str(Run(launcher(times=Times(0.02, 0.1, 0.2, 10.0))).end().error)
    assert 'cannot start (CreateContainerConfigError: secret "k2-s3" not found); create it, or correct the' in error
    assert kubernetes.of("jobs") == []


def queued(kubernetes: FakeKubernetes, **timeouts: int) -> Placement:
    kubernetes.add(
        "/apis/kueue.x-k8s.io/v1beta2/namespaces/ml/localqueues", {"metadata": {"name": "k2-gpu"}, "spec": {}}
    )
    here = placement("tokenize", **timeouts)
    return here.model_copy(update={"pool": here.pool.model_copy(update={"queue": "k2-gpu"})})


def workload(kubernetes: FakeKubernetes, job: dict[str, Any], message: str) -> None:
    owner = {"kind": "Job", "name": NAME, "uid": job["metadata"]["uid"]}
    waiting = {"type": "QuotaReserved", "status": "False", "message": message}
    body = {"metadata": {"name": "w", "ownerReferences": [owner]}, "status": {"conditions": [waiting]}}
    kubernetes.add(WORKLOADS, body)


def test_a_queue_that_is_not_there_is_refused_before_anything_is_made(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]
) -> None:
    here = queued(kubernetes)
    kubernetes.remove("/apis/kueue.x-k8s.io/v1beta2/namespaces/ml/localqueues/k2-gpu")
    error = Run(launcher(here)).end().error
    assert isinstance(error, UserError)
    assert "LocalQueue k2-gpu: there is none in ml, and pools.job.queue names it" in str(error)
    assert kubernetes.of("jobs") == []


def test_what_is_missing_is_refused_before_anything_is_made(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], store: Store
) -> None:
    kubernetes.served.remove("trainer.kubeflow.org/v1alpha1")
    kubernetes.denied = {("delete", "jobs"), ("list", "pods")}
    kubernetes.remove(f"{CORE}/secrets/k2-s3")
    error = Run(launcher(placement("pretrain", "gpus"))).end().error
    assert isinstance(error, UserError)
    assert "pools.gpus.launch: nothing serves trainer.kubeflow.org/v1alpha1; install Kubeflow Trainer 2, or" in str(
        error
    )
    assert "may pods in ml: missing: list; the Role k2-launcher grants them" in str(error)
    assert "Secret k2-s3: there is none in ml, and store.secret names it; `kubectl create secret` makes it" in str(
        error
    )
    assert "may jobs" not in str(error)
    assert [path for verb, path in kubernetes.requests if verb == "POST" and path != REVIEWS] == []
    assert list(store.list("runs/")) == []


def test_a_suspended_job_that_kueue_does_not_know_fails_with_the_reason(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]
) -> None:
    run = Run(launcher(queued(kubernetes), times=Times(poll_s=0.02, admission_s=0.3)))
    assert created(kubernetes)["spec"]["suspend"] is True
    assert "Kueue made no Workload for it in 0.3 s" in str(run.end().error)
    assert kubernetes.of("jobs") == []


def test_a_queue_that_never_admits_says_why(kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]) -> None:
    run = Run(launcher(queued(kubernetes, queue_timeout_s=1)))
    workload(kubernetes, created(kubernetes), "insufficient quota for nvidia.com/gpu")
    assert "was suspended for 1 s (insufficient quota for nvidia.com/gpu)" in str(run.end().error)


def test_preemption_is_reported_and_waited_for(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], make_artifact: Make, store: Store,
    progress: SilentProgress,
) -> None:  # fmt: skip
    run = Run(launcher(queued(kubernetes)))
    job = created(kubernetes)
    assert job["spec"]["activeDeadlineSeconds"] == 3600  # Time in the queue does not count.
    workload(kubernetes, job, "waiting")
    job["spec"]["suspend"] = False
    kubernetes.status(NAME, active=1, ready=1)
    wait_for(lambda: "running" in [event.get("state") for event in progress.events])
    suspended = {"type": "Suspended", "status": "True", "reason": "Preempted", "message": "by team b"}
    kubernetes.status(NAME, conditions=[suspended])
    wait_for(lambda: "job_preempted" in kinds(progress))
    assert progress.events[-1]["reason"] == "Preempted: by team b"
    kubernetes.status(NAME, active=1, ready=1)
    finish(kubernetes, make_artifact, store)
    assert run.end().artifact is not None


def test_beyond_the_budget_nothing_is_started(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], store: Store
) -> None:
    write_stage_record(store, "yesterday", {"stage": "pretrain", "status": "done", "wall_s": 7200.0})
    spent = placement("tokenize").model_copy(update={"budget": Budget(limit=19.0), "costs": {"pretrain": 10.0}})
    error = Run(launcher(spent)).end().error
    assert isinstance(error, UserError)
    assert "budget: 20.00 of 19.00 were spent in 30 days; raise budget.limit" in str(error)
    assert kubernetes.of("jobs") == []
    run = Run(launcher(spent.model_copy(update={"budget": Budget(limit=21.0)})))
    assert created(kubernetes)
    kubernetes.remove(f"{JOBS}/{NAME}")
    assert "somebody deleted the job" in str(run.end().error)


def test_a_users_error_is_one_here_too(kubernetes: FakeKubernetes, launcher: Callable[..., Launcher]) -> None:
    run = Run(launcher())
    created(kubernetes)
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 2"}
    kubernetes.status(NAME, conditions=[failed])
    assert isinstance(run.end().error, UserError)


def test_a_log_that_cannot_be_read_for_now_does_not_hold_up_the_rest(
    kubernetes: FakeKubernetes, launcher: Callable[..., Launcher], make_artifact: Make, store: Store
) -> None:
    """As while the node of the first pod is away: the server answers 500 until the pod is replaced."""
    kubernetes.failures.append(Failure("GET", "log$", 500, times=10**6))
    run = Run(launcher())
    created(kubernetes)
    kubernetes.add("/api/v1/namespaces/ml/pods", {"metadata": {"name": "p", "labels": {"job-name": NAME}}, "spec": {}})
    wait_for(lambda: kubernetes.failures[0].times < 10**6 - 3)
    finish(kubernetes, make_artifact, store)
    assert run.end().artifact is not None
