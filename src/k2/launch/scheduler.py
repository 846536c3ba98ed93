"""torchx schedulers over K2's ways to run jobs, for `torchx run -s trainjob` and `-s indexed_job`."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml
from torchx.schedulers.api import (
    DescribeAppResponse,
    ListAppResponse,
    Scheduler,
    Stream,
    StructuredOpts,
    filter_regex,
)
from torchx.schedulers.ids import make_unique
from torchx.specs import AppDef, AppDryRunInfo, AppState, CfgVal, ReplicaStatus, Role, RoleStatus
from torchx.util.strings import normalize_str

from k2.errors import UserError
from k2.launch import backend
from k2.launch.backend import Backend, State, Status, Terms
from k2.launch.cluster import Cluster, Object
from k2.launch.logs import LogReader, pod_of_node
from k2.launch.pod import CONTAINER

STATES = {
    State.SUSPENDED: AppState.PENDING,
    State.PENDING: AppState.PENDING,
    State.RUNNING: AppState.RUNNING,
    State.COMPLETE: AppState.SUCCEEDED,
    State.FAILED: AppState.FAILED,
}

NAME_LENGTH = 28
"""Of the application's name. What follows makes it unique, and operators add suffixes to what they make of it."""

POLL_S = 2.0


@dataclass
class JobOpts(StructuredOpts):  # type: ignore[misc]
    """What `-cfg` takes."""

    namespace: str = "default"
    """Namespace of the job."""

    queue: str | None = None
    """Kueue LocalQueue that admits it; with one, the job is created suspended."""

    deadline_s: int | None = None
    """Seconds that the job may be active."""

    runtime: str = "torch-distributed"
    """Training runtime of a TrainJob."""

    runtime_kind: str = "ClusterTrainingRuntime"
    """ClusterTrainingRuntime or TrainingRuntime."""


class JobScheduler(Scheduler[JobOpts]):  # type: ignore[misc]
    """Submits applications of one role as jobs of a cluster. An application's id is NAMESPACE:NAME."""

    def __init__(self, name: str, session_name: str, jobs: Backend) -> None:
        super().__init__(name, session_name)
        self._jobs = jobs
        self._cluster: Cluster | None = None

    def _run_opts(self) -> Any:
        return JobOpts.as_runopts()

    def _submit_dryrun(self, app: AppDef, cfg: JobOpts) -> AppDryRunInfo[Object, JobOpts]:
        name = normalize_str(make_unique(app.name[:NAME_LENGTH]))
        named = AppDef(name, app.roles, dict(app.metadata))
        terms = Terms(cfg.namespace, cfg.queue, cfg.deadline_s, (cfg.runtime_kind, cfg.runtime))
        return AppDryRunInfo(self._jobs.job(named, terms), lambda body: yaml.safe_dump(body, sort_keys=False))

    def schedule(self, dryrun_info: AppDryRunInfo[Object, JobOpts]) -> str:
        """Create the job."""
        body = dryrun_info.request
        namespace = str(body["metadata"]["namespace"])
        made = backend.create(self._in(namespace), self._jobs, body)
        return f"{namespace}:{made['metadata']['name']}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """The job's state, or None when it is gone."""
        cluster, name = self._find(app_id)
        job = cluster.get(self._jobs.kind, name)
        if job is None:
            return None
        status, state = self._jobs.status(job), STATES[self._jobs.status(job).state]
        nodes = _nodes(job)
        replicas = [ReplicaStatus(id=i, state=state, role=CONTAINER, hostname="") for i in range(nodes)]
        return DescribeAppResponse(
            app_id=app_id,
            state=state,
            msg=status.reason,
            roles=[Role(name=CONTAINER, image="", num_replicas=nodes)],
            roles_statuses=[RoleStatus(CONTAINER, replicas)],
        )

    def list(self, cfg: Mapping[str, CfgVal] | None = None) -> list[ListAppResponse]:
        """The jobs of a namespace."""
        namespace = str((cfg or {}).get("namespace") or JobOpts.namespace)
        jobs = self._in(namespace).list(self._jobs.kind)
        return [self._listed(namespace, job, self._jobs.status(job)) for job in jobs]

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Lines of one node's log; `since`, `until` and `streams` are not told apart."""
        lines = self._lines(app_id, k, should_tail)
        return filter_regex(regex, lines) if regex else lines

    def _lines(self, app_id: str, node: int, tail: bool) -> Iterable[str]:
        cluster, name = self._find(app_id)
        reader: LogReader | None = None
        while True:
            job = cluster.get(self._jobs.kind, name)
            ended = job is None or self._jobs.status(job).state.ended
            pod = pod_of_node(cluster, self._jobs.pods(name), node)
            if pod and (reader is None or reader.pod != pod["metadata"]["name"]):
                reader = LogReader(cluster, pod["metadata"]["name"], pod["spec"]["containers"][0]["name"])
            yield from (f"{line}\n" for line in (reader.lines() if reader else ()))
            if ended or not tail:
                return
            time.sleep(POLL_S)

    def _cancel_existing(self, app_id: str) -> None:
        cluster, name = self._find(app_id)
        cluster.delete(self._jobs.kind, name)

    def _find(self, app_id: str) -> tuple[Cluster, str]:
        namespace, colon, name = app_id.partition(":")
        if not colon:
            raise UserError(f"{app_id}: an application of {self.backend} is NAMESPACE:NAME")
        return self._in(namespace), name

    def _in(self, namespace: str) -> Cluster:
        """A dry run needs no cluster, so it is connected to late."""
        if self._cluster is None or self._cluster.namespace != namespace:
            self._cluster = Cluster.connect(namespace)
        return self._cluster

    @staticmethod
    def _listed(namespace: str, job: Object, status: Status) -> ListAppResponse:
        name = str(job["metadata"]["name"])
        return ListAppResponse(app_id=f"{namespace}:{name}", state=STATES[status.state], name=name)


def _nodes(job: Object) -> int:
    spec = job["spec"]
    return int(spec["completions"] if "completions" in spec else spec["trainer"].get("numNodes", 1))
