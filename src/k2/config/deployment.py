"""Where pipelines run: images, pools of nodes, queues, secret names. The one file that a platform team writes.

What a run does is configuration (`k2.config.k2`); nothing here can change the bytes of a result.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from k2.config.base import Section, setting
from k2.config.k2 import K2Config
from k2.config.load import preset_names
from k2.config.quantity import amount

RESUMABLE = frozenset({"ingest", "rephrase", "pretrain", "synthesize", "sft", "rl", "quantize", "evaluate"})
"""Stages that publish their state as they go and continue from it; only these may run where nodes are taken away."""

DISTRIBUTED = frozenset({"pretrain"})
"""Stages that several processes can do together; a job runs every other one as a single process on a single node."""

STAGE_NAMES = tuple(name for name in K2Config.model_fields if name not in ("preset", "run"))

_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"


def _text(value: Any) -> Any:
    """YAML reads `cpu: 2` as a number; Kubernetes writes quantities and label values as text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _quantity(value: str) -> str:
    amount(value)
    return value


Quantity = Annotated[str, BeforeValidator(_text), AfterValidator(_quantity)]
Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
Resource = Annotated[str, Field(pattern=rf"^({_NAME}/)?[A-Za-z0-9][A-Za-z0-9._-]*$")]
LabelValue = Annotated[str, BeforeValidator(_text), Field(pattern=_LABEL_VALUE)]
Image = Annotated[str, Field(pattern=r"^[^@\s]+@sha256:[0-9a-f]{64}$")]
Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
NetworkVariable = Annotated[str, Field(pattern=r"^(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+$")]
Topology = Literal["required", "preferred"]


class Accelerator(Section):
    """What one pod of a pool asks its node for."""

    resource: Resource = setting(
        "nvidia.com/gpu", "resource name; a MIG slice is one too, such as nvidia.com/mig-1g.10gb"
    )
    count: int = setting(1, "how many of it one pod gets", ge=1, le=64)
    peak_tflops: float | None = setting(
        None, "peak of one of it in bf16, TFLOP/s without sparsity; MFU is reported against it, or not at all", gt=0
    )


class Toleration(Section):
    """A taint of nodes that pods accept."""

    key: str = setting("", "the taint's key; empty with Exists: every taint")
    operator: Literal["Exists", "Equal"] = setting("Exists", "Exists: any value; Equal: this value")
    value: str = setting("", "the taint's value, with Equal")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = setting("NoSchedule", "empty: every effect")

    def manifest(self) -> dict[str, str]:
        """As a pod has it."""
        return {key: value for key, value in self if value}


class Scratch(Section):
    """Disk for temporary files and caches, mounted at /scratch. Nothing on it is needed after the pod."""

    size: Quantity = setting("10Gi", "its size")
    claim: Name | None = setting(None, "name of an existing PersistentVolumeClaim to use")
    storage_class: Name | None = setting(
        None, "a volume made for the pod and gone with it, such as of a class on node-local NVMe"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.claim and self.storage_class:
            raise ValueError("name a claim or a storage_class, not both; neither is the node's own disk")
        return self


class Runtime(Section):
    """The training runtime that a TrainJob refers to."""

    kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = setting(
        "ClusterTrainingRuntime", "for all namespaces, or of this one"
    )
    name: Name = setting("k2-torch-gpu", "its name; the platform brings k2-torch-gpu and k2-torch-cpu")


class Pool(Section):
    """One kind of node, and the size of the pods that run there."""

    image: str = setting("cpu", "which of `images` its pods run")
    launch: Literal["pod", "job", "trainjob"] = setting(
        "pod",
        "pod: the Kubeflow pod does the work; job: it starts a Kubernetes Job of `nodes` pods and follows it;"
        " trainjob: the same with a TrainJob of Kubeflow Trainer 2",
    )
    runtime: Runtime = setting(Runtime(), "training runtime, with launch: trainjob")
    cpu: Quantity = setting("2", "CPU of one pod, request and limit, such as 500m or 16", pattern=r"^\d+(\.\d+)?m?$")
    memory: Quantity = setting("4Gi", "memory of one pod's processes, request and limit; shm is added to it")
    nodes: int = setting(1, "pods of one job", ge=1, le=4096)
    accelerator: Accelerator | None = setting(None, "accelerator of one pod of a job")
    rdma: dict[Resource, int] = setting({}, "further device resources of one pod, such as rdma/hca: 1")
    nccl: dict[NetworkVariable, str] = setting({}, "environment for NCCL, Gloo, UCX and libfabric")
    node_labels: dict[Resource, LabelValue] = setting({}, "labels of the pool's nodes")
    tolerations: tuple[Toleration, ...] = setting((), "taints that its pods accept")
    spot: bool = setting(False, "the nodes can be taken away; only for stages that resume, launched as jobs")
    queue: Name | None = setting(None, "Kueue LocalQueue that admits its pods; one of `queues`")
    topology: dict[Topology, Resource] = setting(
        {}, "`required` or `preferred`: node label whose value all pods of a job share", max_length=1
    )
    shm: Quantity | None = setting(None, "size of /dev/shm, which is memory; null: the runtime's 64 MB")
    scratch: Scratch = setting(Scratch(), "disk for temporary files")
    grace_s: int | None = setting(None, "seconds between SIGTERM and SIGKILL; null: the cluster's", ge=0, le=3600)
    runtime_class: Name | None = setting(None, "RuntimeClass of its pods")
    cost_per_hour: float = setting(0.0, "what one pod costs in an hour, in the currency that budgets are in", ge=0)

    def job_only(self) -> list[str]:
        """Fields in use that a Kubeflow pod cannot, or must not, have."""
        used = {
            # A step asks for it before it can see that the result is there already.
            "accelerator": self.accelerator,
            "nodes": self.nodes > 1,
            "rdma": self.rdma,
            "spot": self.spot,
            "topology": self.topology,
            "grace_s": self.grace_s is not None,
            "runtime_class": self.runtime_class,
        }
        return [name for name, value in used.items() if value]

    def requests(self) -> dict[str, float]:
        """What one run of a stage here takes from its queue, in base units."""
        devices = {self.accelerator.resource: self.accelerator.count} if self.accelerator else {}
        each = {"cpu": amount(self.cpu), "memory": self.memory_bytes(), **devices, **self.rdma}
        return {name: self.nodes * value for name, value in each.items()}

    def memory_bytes(self) -> float:
        """Memory of one pod, its /dev/shm included, which counts against the limit."""
        return amount(self.memory) + (amount(self.shm) if self.shm else 0)


class Queue(Section):
    """A Kueue LocalQueue and what it may use at once."""

    quota: dict[Resource, Quantity] = setting(..., "resource -> how much", min_length=1)


class SecretKey(Section):
    """One value of a Secret."""

    secret: Name = setting(..., "name of the Secret")
    key: str = setting(..., "key in it", min_length=1)
    stages: tuple[str, ...] = setting((), "stages that get it; empty: all")


class StoreAccess(Section):
    """How tasks reach the object store."""

    secret: Name = setting(..., "Secret with K2_S3_ENDPOINT, K2_S3_BUCKET, K2_S3_PREFIX and the two keys")
    workload_identity: bool = setting(
        False, "credentials come from the service account: K2_S3_ACCESS_KEY and K2_S3_SECRET_KEY are not in the Secret"
    )


class Kubeflow(Section):
    """The Kubeflow Pipelines install."""

    endpoint: str = setting(
        "http://ml-pipeline.kubeflow.svc.cluster.local:8888",
        "URL of the API server; KF_PIPELINES_ENDPOINT overrides it",
        pattern=r"^https?://[^\s@]+$",
    )
    namespace: Name = setting("kubeflow", "namespace of pipelines and runs: the install's, or a profile's")
    multi_user: bool = setting(False, "the install separates profiles: requests name the namespace")
    service_account: Name | None = setting(None, "service account of runs; null: the install's")
    experiment: str = setting("k2", "experiment that runs are grouped under", min_length=1)
    timeout_s: float = setting(30.0, "seconds that one request may take", gt=0)
    time_zone: str = setting("UTC", "the install's CRON_SCHEDULE_TIMEZONE: what crons of recurring runs mean")


class Network(Section):
    """How tasks reach what is outside the cluster."""

    ca_config_map: Name | None = setting(None, "ConfigMap with a CA bundle that tasks trust")
    ca_key: str = setting("ca.crt", "its key", min_length=1)
    https_proxy: str | None = setting(None, "proxy for https", pattern=r"^https?://[^\s@]+$")
    http_proxy: str | None = setting(None, "proxy for http", pattern=r"^https?://[^\s@]+$")
    no_proxy: str = setting(".svc,.cluster.local,localhost,127.0.0.1", "what is reached without them")


class Identity(Section):
    """Who containers run as; never root."""

    user: int | None = setting(1000, "UID; null: the cluster chooses, as OpenShift does", ge=1)
    group: int | None = setting(1000, "GID; null: the cluster chooses", ge=0)


class Timeouts(Section):
    """How long things may take. A task that is stopped continues from its last published step when run again."""

    task_hours: float = setting(24.0, "one task, once it runs", gt=0)
    stages: dict[str, float] = setting({}, "stage -> hours, where it differs")
    queue_hours: float = setting(24.0, "waiting for a queue", gt=0)
    run_hours: float | None = setting(336.0, "a whole run; null: no limit, as servers before 2.17 need it", gt=0)
    keep_hours: float | None = setting(
        72.0, "a finished run's pods and their logs stay; null: the server's choice, as before 2.17", gt=0
    )


class Budget(Section):
    """Money beyond which no job is started; prices are the pools' `cost_per_hour`."""

    limit: float = setting(..., "what all runs of this store may cost in `days`", gt=0)
    days: int = setting(30, "days that the budget is for", ge=1, le=366)


class Sandbox(Section):
    """Where code that a model wrote runs: in pods of this namespace that reach nothing."""

    image: str = setting("cpu", "which of `images` they run; it has K2 and what programs may import")
    runtime_class: Name | None = setting(
        None,
        "RuntimeClass that keeps them from the node's kernel, such as gVisor's or Kata's; null: the nodes' own",
    )
    node_labels: dict[Resource, LabelValue] = setting({}, "labels of their nodes")
    tolerations: tuple[Toleration, ...] = setting((), "taints of their nodes that they accept")


class Placement(Section):
    """Everything that decides where one task runs. Crosses to a launcher as JSON in `K2_LAUNCH`."""

    task: str = setting(..., "stage, `configure` or `guard`")
    image: Image = setting(..., "image by digest")
    pool_name: str = setting(..., "the pool's name")
    pool: Pool = setting(..., "where it runs")
    timeout_s: int = setting(..., "seconds the work may take", gt=0)
    queue_timeout_s: int = setting(..., "seconds it may wait for admission", gt=0)
    pull_secrets: tuple[Name, ...] = setting((), "Secrets for the registry")
    store: StoreAccess = setting(..., "the object store's Secret")
    secrets: dict[Variable, SecretKey] = setting({}, "environment from Secrets")
    network: Network = setting(Network(), "CA bundle and proxies")
    identity: Identity = setting(Identity(), "who it runs as")
    labels: dict[Resource, LabelValue] = setting({}, "labels of its pods")
    budget: Budget | None = setting(None, "what may be spent; a launcher starts no job beyond it")
    costs: dict[str, float] = setting({}, "stage -> what an hour of it costs, where there is a budget")


class Deployment(Section):
    """Where a compiled pipeline runs."""

    images: dict[str, Image] = setting(..., "name -> registry/repository@sha256:digest", min_length=1)
    pull_secrets: tuple[Name, ...] = setting((), "Secrets for the registry")
    store: StoreAccess = setting(..., "the object store's Secret")
    secrets: dict[Variable, SecretKey] = setting({}, "environment variable -> Secret, such as K2_LLM_API_KEY")
    pools: dict[Name, Pool] = setting(..., "name -> nodes and the size of pods", min_length=1)
    default_pool: str = setting(..., "pool of every task that `stages` does not name, and of launchers")
    stages: dict[str, str] = setting({}, "stage -> pool")
    queues: dict[Name, Queue] = setting({}, "name -> quota")
    labels: dict[Literal["team", "project", "cost-center"], LabelValue] = setting({}, "k2.dev/<name> of every pod")
    preset: Name | None = setting(None, "the one preset that runs may have, and k2.dev/preset of every pod; null: any")
    kubeflow: Kubeflow = setting(Kubeflow(), "the Kubeflow Pipelines install")
    network: Network = setting(Network(), "CA bundle and proxies")
    identity: Identity = setting(Identity(), "who containers run as")
    timeouts: Timeouts = setting(Timeouts(), "how long things may take")
    budget: Budget | None = setting(None, "what jobs may cost; null: no limit")
    sandbox: Sandbox | None = setting(None, "where code that a model wrote runs; null: nowhere")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = [*self._unknown_names(), *self._misplaced(), *self._unusable_pools()]
        if found:
            raise ValueError("; ".join(found))
        return self

    def pool_of(self, task: str) -> str:
        """Name of the pool of a stage or of another task."""
        return self.stages.get(task, self.default_pool)

    def placement(self, task: str) -> Placement:
        """Where one task runs; `task` is a stage, `configure` or `guard`."""
        name = self.pool_of(task)
        pool = self.pools[name]
        return Placement(
            task=task,
            image=self.images[pool.image],
            pool_name=name,
            pool=pool,
            timeout_s=int(3600 * self.timeouts.stages.get(task, self.timeouts.task_hours)),
            queue_timeout_s=int(3600 * self.timeouts.queue_hours),
            pull_secrets=self.pull_secrets,
            store=self.store,
            secrets={name: s for name, s in sorted(self.secrets.items()) if not s.stages or task in s.stages},
            network=self.network,
            identity=self.identity,
            labels=self.paid_by() | {"k2.dev/stage": task},
            budget=self.budget,
            costs=self.costs() if self.budget else {},
        )

    def paid_by(self) -> dict[str, str]:
        """Labels of every pod: who pays, and the preset where there is only one."""
        known = {f"k2.dev/{name}": value for name, value in self.labels.items()}
        return known | ({"k2.dev/preset": self.preset} if self.preset else {})

    def costs(self) -> dict[str, float]:
        """Stage -> what an hour of it costs, where that is more than nothing."""
        hourly = {name: self.pools[self.pool_of(name)] for name in STAGE_NAMES}
        return {name: pool.nodes * pool.cost_per_hour for name, pool in hourly.items() if pool.cost_per_hour}

    def job_kinds(self) -> list[str]:
        """How the stages that run as jobs are launched."""
        pools = (self.pools[self.pool_of(stage)] for stage in STAGE_NAMES)
        return sorted({pool.launch for pool in pools} - {"pod"})

    def _unknown_names(self) -> Iterator[str]:
        uses = {"default_pool": self.default_pool} | {f"stages.{stage}": pool for stage, pool in self.stages.items()}
        for field, named in uses.items():
            if named not in self.pools:
                yield f"{field}: there is no pool {named!r}; the pools are {', '.join(self.pools)}"
        if self.preset not in (None, *preset_names()):
            yield f"preset: {self.preset!r} is unknown; the presets are {', '.join(preset_names())}"
        for name, pool in self.pools.items():
            if pool.image not in self.images:
                yield f"pools.{name}.image: there is no image {pool.image!r}; the images are {', '.join(self.images)}"
            if pool.queue and pool.queue not in self.queues:
                yield f"pools.{name}.queue: the queue {pool.queue!r} has no quota; add it to queues"
        if self.sandbox and self.sandbox.image not in self.images:
            yield f"sandbox.image: there is no image {self.sandbox.image!r}; the images are {', '.join(self.images)}"
        named_stages = {f"secrets.{name}.stages": set(key.stages) for name, key in self.secrets.items()}
        named_stages |= {"stages": set(self.stages), "timeouts.stages": set(self.timeouts.stages)}
        for field, stages in named_stages.items():
            for stage in sorted(stages - set(STAGE_NAMES)):
                yield f"{field}: there is no stage {stage!r}; the stages are {', '.join(STAGE_NAMES)}"

    def _misplaced(self) -> Iterator[str]:
        for stage in sorted(STAGE_NAMES):
            pool = self.pools.get(self.pool_of(stage))
            if pool and pool.spot and stage not in RESUMABLE:
                yield (
                    f"stages.{stage}: {self.pool_of(stage)} is a spot pool and {stage} starts over when its node goes;"
                    f" only {', '.join(sorted(RESUMABLE))} may run there"
                )
            if pool and pool.nodes > 1 and stage not in DISTRIBUTED:
                yield (
                    f"stages.{stage}: {self.pool_of(stage)} has nodes: {pool.nodes}, and {stage} runs on one; only"
                    f" {', '.join(sorted(DISTRIBUTED))} uses several"
                )
        launcher = self.pools.get(self.default_pool)
        if launcher and launcher.launch != "pod":
            yield (
                f"default_pool: launchers run there, so it cannot have launch: {launcher.launch} itself; name a small"
                " pool of pods"
            )

    def _unusable_pools(self) -> Iterator[str]:
        if self.budget and not any(pool.cost_per_hour for pool in self.pools.values()):
            yield "budget: no pool has a price, so nothing would ever count; set pools.<name>.cost_per_hour"
        for name, pool in self.pools.items():
            if pool.launch == "pod" and pool.job_only():
                fields = ", ".join(pool.job_only())
                yield f"pools.{name}: a Kubeflow pod cannot have {fields}; set pools.{name}.launch: job"
            if pool.launch == "trainjob" and pool.runtime_class:
                yield f"pools.{name}.runtime_class: pods of a TrainJob have their runtime's; set it there"
            if pool.queue in self.queues:
                yield from _beyond_quota(name, pool, self.queues[pool.queue])


def _beyond_quota(name: str, pool: Pool, queue: Queue) -> Iterator[str]:
    for resource, wanted in pool.requests().items():
        if resource not in queue.quota:
            yield f"queues.{pool.queue}.quota: add {resource}, which pool {name} asks for"
        elif wanted > amount(queue.quota[resource]):
            given = queue.quota[resource]
            yield f"queues.{pool.queue}.quota.{resource}: {given} never admits pool {name}, which asks for {wanted:g}"
