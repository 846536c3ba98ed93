"""What a pipeline step does for a stage that runs as a job: create or adopt the job, follow it, return its artifact.

The job publishes the artifact itself. Whatever becomes of this process, the job has a deadline and an owner of its own.
"""

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from k2.config.deployment import Placement
from k2.errors import StageError, UserError
from k2.execution.contract import Progress
from k2.launch import backend
from k2.launch.app import application
from k2.launch.backend import DIGEST, Backend, State, Status, Terms
from k2.launch.cluster import PODS, WORKFLOWS, WORKLOADS, Cluster, ClusterError, Object
from k2.launch.indexed_job import IndexedJob
from k2.launch.logs import LogReader, LogSink, pod_of_node
from k2.launch.pod import CONTAINER, waits_for
from k2.launch.preflight import require
from k2.launch.trainjob import TrainJob
from k2.launch.work import Work
from k2.platform.guard import DAY_S, spending
from k2.platform.needs import of_placement
from k2.platform.pods import POD_VARIABLE, PRESET_LABEL, RUN_LABEL
from k2.store.artifacts import Artifact, find
from k2.store.client import Store

BACKENDS: dict[str, Backend] = {"job": IndexedJob(), "trainjob": TrainJob()}

RUN_NAME, KEY, ATTEMPT = "k2.dev/run-name", "k2.dev/key", "k2.dev/attempt"
POLL_S = 5.0
FLUSH_S = 30.0
ADMISSION_S = 60.0
"""Seconds in which Kueue makes a Workload for a suspended job, if it manages the job at all."""

NEVER_STARTS = ("CreateContainerConfigError", "InvalidImageName")
"""What a pod waits for that only people can mend, such as a Secret that is not there."""

DELETION_S = 600.0
CREATIONS = 3
"""Times that a job is looked for and created before its name is given up."""


@dataclass(frozen=True)
class Times:
    """Seconds between polls, and the limits that are not the placement's."""

    poll_s: float = POLL_S
    flush_s: float = FLUSH_S
    admission_s: float = ADMISSION_S
    deletion_s: float = DELETION_S


def launch(work: Work, placement: str, store: Store, progress: Progress) -> Artifact:
    """Have a job make some work; `placement` is the JSON of `K2_LAUNCH`.

    Raises:
        UserError, StageError: as `Launcher.run`.
    """
    here = Placement.model_validate_json(placement)
    return Launcher(Cluster.connect(), here, store, progress).run(work)


class Launcher:
    """Runs one stage as a job of one cluster."""

    def __init__(self, cluster: Cluster, here: Placement, store: Store, progress: Progress, times: Times | None = None):
        self.cluster, self.here, self.store, self.progress = cluster, here, store, progress
        self.times, self.backend = times or Times(), BACKENDS[here.pool.launch]

    def run(self, work: Work) -> Artifact:
        """The artifact that a job made.

        Raises:
            UserError: the cluster lacks what the placement names or needs, the budget is spent, or a live run makes the
                same already.
            StageError: the job failed, waited or ran too long, or was deleted.
        """
        require(self.cluster, of_placement(self.here))
        work.save(self.store)
        job = self._obtain(work, owner(self.cluster))
        name = str(job["metadata"]["name"])
        sink = LogSink(self.store, f"runs/{work.run}/logs/{work.stage}/{name}")
        try:
            _Watch(self, name, sink).until_complete()
        finally:
            sink.flush()
        artifact = find(self.store, work.stage, work.key)
        if artifact is None:
            raise StageError(f"{name}: the job is complete but published nothing; see its log in the store")
        return artifact

    def delete(self, name: str) -> None:
        """Delete a job and wait until it and its pods are gone, so that nothing of it works on."""
        self.cluster.delete(self.backend.kind, name)
        deadline = time.monotonic() + self.times.deletion_s
        while self.cluster.get(self.backend.kind, name) is not None:
            if time.monotonic() > deadline:
                raise StageError(f"{name}: its pods do not end in {self.times.deletion_s:g} s")
            time.sleep(self.times.poll_s)

    def _require_budget(self) -> None:
        """What is begun is finished; nothing new is begun once the money is spent."""
        budget = self.here.budget
        if budget is None:
            return
        spent, _ = spending(self.store, self.here.costs, time.time() - budget.days * DAY_S)
        if spent >= budget.limit:
            raise UserError(
                f"budget: {spent:.2f} of {budget.limit:.2f} were spent in {budget.days} days; raise budget.limit in the"
                " deployment file and upload the pipeline again, or wait"
            )

    def _obtain(self, work: Work, workflow: Object | None) -> Object:
        """A live or complete job that is as ours would be, or a new one."""
        attempt = 1
        for _ in range(CREATIONS):
            for job in self.cluster.list(self.backend.kind, {KEY: work.key[:63]}):
                name, number = str(job["metadata"]["name"]), int(job["metadata"]["labels"][ATTEMPT])
                if self._usable(job, work, self._job(work, number, workflow), workflow):
                    backend.complete(self.cluster, self.backend, job)
                    self.progress.event("job_adopted", job=name)
                    return job
                self.delete(name)
                attempt = max(attempt, number + 1)
            self._require_budget()
            body = backend.owned(self._job(work, attempt, workflow), workflow)
            try:
                job = backend.create(self.cluster, self.backend, body)
            except ClusterError as error:
                # Another launcher was faster, or our own request got through though its answer was lost.
                if error.status != 409:
                    raise
                continue
            self.progress.event("job_created", job=job["metadata"]["name"], nodes=self.here.pool.nodes)
            return job
        raise StageError(f"{body['metadata']['name']}: something that is no job of K2 has this name; delete it")

    def _usable(self, job: Object, work: Work, wanted: Object, workflow: Object | None) -> bool:
        """Whether a job does what ours would.

        Raises:
            UserError: another run, which is alive, owns it.
        """
        name, status, theirs = job["metadata"]["name"], self.backend.status(job), backend.owner_of(job)
        if job["metadata"].get("deletionTimestamp") or status.state is State.FAILED:
            return False
        mine = (theirs or {}).get("uid") == (workflow or {}).get("uid")
        if not mine and not status.state.ended and self._alive(theirs):
            run = job["metadata"]["labels"].get(RUN_NAME, "")
            raise UserError(
                f"{name}: run {run!r} is making the same now; wait for it and run this one again, or cancel it"
            )
        same = (job["metadata"].get("annotations") or {}).get(DIGEST) == wanted["metadata"]["annotations"][DIGEST]
        return same and mine and (not status.state.ended or find(self.store, work.stage, work.key) is not None)

    def _alive(self, theirs: Object | None) -> bool:
        """Whether the workflow that owns a job still runs. A job without an owner is somebody's."""
        if theirs is None or theirs["kind"] != "Workflow":
            return True
        workflow = self.cluster.get(WORKFLOWS, theirs["name"])
        ended = ("Succeeded", "Failed", "Error")
        if workflow is None or workflow["metadata"]["uid"] != theirs["uid"]:
            return False
        return workflow.get("status", {}).get("phase") not in ended

    def _job(self, work: Work, attempt: int, workflow: Object | None) -> Object:
        """The job that makes some work."""
        here, pool = self.here, self.here.pool
        name = f"k2-{work.stage}-{work.key[:10]}-{attempt}"
        app = application(name, here, ["k2.launch.rank", work.location], {"K2_RUN": work.run})
        app.metadata |= {RUN_LABEL: run_label(work.run, workflow), RUN_NAME: run_label(work.run, None)}
        app.metadata |= {KEY: work.key[:63], ATTEMPT: str(attempt)}
        app.metadata |= {PRESET_LABEL: work.preset} if work.preset else {}
        waiting = 0 if pool.queue else here.queue_timeout_s
        runtime = (pool.runtime.kind, pool.runtime.name)
        terms = Terms(self.cluster.namespace, pool.queue, here.timeout_s + waiting, runtime)
        return self.backend.job(app, terms)


class _Watch:
    """A job from its creation to its end."""

    def __init__(self, launcher: Launcher, name: str, sink: LogSink) -> None:
        self.launcher, self.name, self.sink = launcher, name, sink
        self.cluster, self.here, self.times = launcher.cluster, launcher.here, launcher.times
        self.reader: LogReader | None = None
        self.status = Status(State.PENDING, "not seen yet")
        self.waiting_since = self.changed = time.monotonic()
        self.ran_s = 0.0

    def until_complete(self) -> None:
        """Follow the job's state and log.

        Raises:
            UserError: it failed by an error of the user's.
            StageError: it failed otherwise, was deleted, or took too long and was deleted here.
        """
        seen = flushed = time.monotonic()
        while True:
            job = self.cluster.get(self.launcher.backend.kind, self.name)
            if job is None:
                raise StageError(f"{self.name}: somebody deleted the job")
            now = time.monotonic()
            self.ran_s += now - seen if self.status.state is State.RUNNING else 0.0
            seen = now
            pod = pod_of_node(self.cluster, self.launcher.backend.pods(self.name))
            self._report(_explained(self.launcher.backend.status(job), pod), now)
            self._read(pod)
            if self.status.state is State.COMPLETE:
                return
            if self.status.state is State.FAILED:
                raise self._failure()
            self._enforce(job, now)
            if now - flushed > self.times.flush_s:
                self.sink.flush()
                flushed = now
            time.sleep(self.times.poll_s)

    def _report(self, status: Status, now: float) -> None:
        """One event for each change; a queue that takes its place away again is no error."""
        before, self.status = self.status, status
        if status == before:
            return
        self.changed = now
        preempted = before.state is State.RUNNING and status.state is State.SUSPENDED
        if before.state is State.RUNNING and not status.state.ended:
            self.waiting_since = now
        values = {"job": self.name, "state": str(status.state), "reason": status.reason}
        self.launcher.progress.event("job_preempted" if preempted else "job_state", **values)

    def _read(self, pod: Object | None) -> None:
        """New lines of rank 0."""
        if pod is None:
            return
        name = str(pod["metadata"]["name"])
        if self.reader is None or self.reader.pod != name:
            self.reader = LogReader(self.cluster, name, CONTAINER)
        self.sink.write(self.reader.lines())

    def _failure(self) -> StageError | UserError:
        """The user's error where a pod ended with the exit code for it, which its failure policy tells."""
        kind = UserError if "PodFailurePolicy" in self.status.reason else StageError
        last = "\n".join(self.sink.tail)
        return kind(f"{self.name}: the job failed ({self.status.reason}); its log ends with\n{last}")

    def _enforce(self, job: Object, now: float) -> None:
        """The limits on waiting and on working, which are separate."""
        waited = now - self.waiting_since
        if self.status.state is State.RUNNING:
            if self.ran_s > self.here.timeout_s:
                self._give_up(f"still runs after {self.here.timeout_s} s; raise timeouts.stages.{self.here.task}")
        elif self._unknown_to_kueue(job, waited):
            self._give_up(
                f"Kueue made no Workload for it in {self.times.admission_s:g} s, so it would stay suspended for ever:"
                " is Kueue running, and does it manage this kind of job in this namespace?"
            )
        elif self.status.reason.startswith(NEVER_STARTS) and now - self.changed > self.times.admission_s:
            self._give_up(f"cannot start ({self.status.reason}); create it, or correct the deployment file")
        elif waited > self.here.queue_timeout_s:
            limit, reason = self.here.queue_timeout_s, _why(self._workload(job)) or self.status.reason
            self._give_up(f"was {self.status.state} for {limit} s ({reason}); raise timeouts.queue_hours")

    def _unknown_to_kueue(self, job: Object, waited: float) -> bool:
        """Whether the job is suspended for a queue whose keeper should have noticed it by now."""
        late = self.status.state is State.SUSPENDED and waited > self.times.admission_s
        return late and self.here.pool.queue is not None and self._workload(job) is None

    def _workload(self, job: Object) -> Object | None:
        """What Kueue made for the job."""
        if self.here.pool.queue is None:
            return None
        for workload in self.cluster.list(WORKLOADS):
            if any(each["uid"] == job["metadata"]["uid"] for each in workload["metadata"].get("ownerReferences") or ()):
                return workload
        return None

    def _give_up(self, problem: str) -> None:
        self.launcher.delete(self.name)
        raise StageError(f"{self.name}: {problem}; the job is deleted")


def delete_live_jobs(cluster: Cluster, run: str, kinds: Iterable[str]) -> list[str]:
    """Delete the jobs of a run that work or wait, of this workflow's only where it is known; returns their names."""
    workflow, deleted = owner(cluster), []
    for backend_of_kind in (BACKENDS[kind] for kind in kinds):
        for job in cluster.list(backend_of_kind.kind, {RUN_LABEL: run_label(run, workflow)}):
            theirs = backend.owner_of(job)
            ours = workflow is None or (theirs or {}).get("uid") == workflow["uid"]
            if ours and not backend_of_kind.status(job).state.ended:
                cluster.delete(backend_of_kind.kind, job["metadata"]["name"])
                deleted.append(str(job["metadata"]["name"]))
    return deleted


def owner(cluster: Cluster) -> Object | None:
    """The workflow that this pod belongs to, as a reference; None outside a workflow."""
    name = os.environ.get(POD_VARIABLE)
    pod = cluster.get(PODS, name) if name else None
    references = pod["metadata"].get("ownerReferences") or () if pod else ()
    for each in references:
        if each["kind"] == "Workflow":
            return {field: each[field] for field in ("apiVersion", "kind", "name", "uid")}
    return None


def run_label(run: str, workflow: Object | None) -> str:
    """The run as a label: the workflow's name, as on the pods of its steps; outside a workflow the run's own name."""
    return str(workflow["name"]) if workflow else re.sub(r"[^A-Za-z0-9._-]", "-", run)[:63].strip("._-")


def _explained(status: Status, pod: Object | None) -> Status:
    """A job that does not start, with what its first pod waits for."""
    if status.state is not State.PENDING or status.reason or pod is None:
        return status
    return Status(State.PENDING, waits_for(pod))


def _why(workload: Object | None) -> str:
    """Kueue's latest word on a workload that waits."""
    conditions = (workload or {}).get("status", {}).get("conditions") or ()
    texts = [str(each.get("message", "")) for each in conditions if each["status"] == "False"]
    return next((text for text in texts if text), "")
