"""Where and how a task runs in a cluster, from the deployment that the pipeline is rendered for.

kfp's local runner knows nothing of this; without a deployment a task only gets its name and no KFP cache.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kfp.dsl import PipelineTask
from kfp.dsl.structures import ResourceSpec

from k2.config.deployment import Deployment, Placement, Pool
from k2.config.quantity import mebibytes
from k2.execution.registry import STAGES
from k2.platform.needs import of_deployment
from k2.platform.pods import (
    CA_FOLDER,
    JOBS_VARIABLE,
    LAUNCH_VARIABLE,
    NEEDS_VARIABLE,
    POD_VARIABLE,
    PRESET_VARIABLE,
    RUN_LABEL,
    SCRATCH,
    WORKFLOW_NAME,
    environment,
    labels,
    secret_variables,
)

FIRST_TASK = "configure"
"""The first step, which finds out whether everything is there that the deployment file names."""

EXIT_TASK = "report"
"""The exit handler, which deletes what a run launched and did not end."""

MARGIN_S = 600
"""Seconds of a launcher beyond its job's waiting and working, for an API server that is slow to answer."""

TITLES = {"configure": "Validate the configuration", "guard": "Is there anything to do, and money for it?"}

_DEPLOYMENT: ContextVar[Deployment | None] = ContextVar("deployment", default=None)


@contextmanager
def deployed(deployment: Deployment) -> Iterator[None]:
    """Place the tasks of pipelines that are built inside."""
    token = _DEPLOYMENT.set(deployment)
    try:
        yield
    finally:
        _DEPLOYMENT.reset(token)


def stage_costs() -> str:
    """JSON: stage -> cost of an hour in the deployment that the pipeline is rendered for."""
    deployment = _DEPLOYMENT.get()
    return json.dumps(deployment.costs() if deployment else {}, sort_keys=True)


def place(task: PipelineTask, name: str) -> PipelineTask:
    """Give a task its display name and, in a rendered pipeline, image, resources, node, time limit and identity.

    KFP's cache is off: K2's own compares content digests and checks that the artifact still exists.
    """
    task.set_display_name(STAGES[name].title if name in STAGES else TITLES[name]).set_caching_options(False)
    deployment = _DEPLOYMENT.get()
    if deployment is None:
        return task
    here, launch = deployment.placement(name), {}
    if here.pool.launch != "pod":
        launch = {LAUNCH_VARIABLE: here.model_dump_json(exclude_defaults=True)}
        here = _launcher(deployment, here)
    elif name == EXIT_TASK and deployment.job_kinds():
        launch = {JOBS_VARIABLE: ",".join(deployment.job_kinds())}
    container = task.container_spec
    # kfp's setters inspect the whole call stack each time, which would be most of the time of compiling.
    container.image, container.resources = here.image, _resources(here.pool)
    container.env = environment(here) | launch | (_asked(deployment) if name == FIRST_TASK else {})
    _schedule(task, here)
    _secure(task, here)
    _mount(task, here)
    if launch:
        _know_itself(task)
    return task


def _launcher(deployment: Deployment, job: Placement) -> Placement:
    """The small pod that starts a job and follows it: it outlasts the job's wait and work."""
    pool = deployment.pools[deployment.default_pool]
    changes = {"pool": pool, "pool_name": deployment.default_pool, "image": deployment.images[pool.image]}
    return job.model_copy(update={**changes, "timeout_s": job.timeout_s + job.queue_timeout_s + MARGIN_S})


def _asked(deployment: Deployment) -> dict[str, str]:
    """What the first step finds out: whether the cluster has all that is named, and the preset is the allowed one."""
    pinned = {PRESET_VARIABLE: deployment.preset} if deployment.preset else {}
    return {NEEDS_VARIABLE: of_deployment(deployment).model_dump_json(exclude_defaults=True)} | pinned


def _know_itself(task: PipelineTask) -> None:
    """The pod's name, by which it finds its workflow: the owner of the jobs."""
    from kfp import kubernetes

    kubernetes.use_field_path_as_env(task, POD_VARIABLE, "metadata.name")


def _resources(pool: Pool) -> ResourceSpec:
    """CPU and memory; requests are limits. Accelerators are for jobs."""
    memory = mebibytes(pool.memory_bytes())
    return ResourceSpec(cpu_request=pool.cpu, cpu_limit=pool.cpu, memory_request=memory, memory_limit=memory)


def _schedule(task: PipelineTask, here: Placement) -> None:
    """Nodes, taints, time limit, labels."""
    from kfp import kubernetes

    for key, value in sorted(here.pool.node_labels.items()):
        kubernetes.add_node_selector(task, key, value)
    for taint in here.pool.tolerations:
        known = {"key": taint.key, "operator": taint.operator, "value": taint.value, "effect": taint.effect}
        kubernetes.add_toleration(task, **{name: value for name, value in known.items() if value})
    kubernetes.set_timeout(task, seconds=here.timeout_s)
    for key, value in (labels(here) | {RUN_LABEL: WORKFLOW_NAME}).items():
        kubernetes.add_pod_label(task, key, value)


def _secure(task: PipelineTask, here: Placement) -> None:
    """Identity, and secrets by name."""
    from kfp import kubernetes

    who = {"run_as_user": here.identity.user, "run_as_group": here.identity.group}
    known = {name: value for name, value in who.items() if value is not None}
    kubernetes.set_security_context(task, run_as_non_root=True, **known)
    if here.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(here.pull_secrets))
    for secret, keys in secret_variables(here).items():
        # Without its Secret a pod never starts. The first step does, to say so, and the last one, to end the run.
        kubernetes.use_secret_as_env(task, secret, keys, optional=here.task in (FIRST_TASK, EXIT_TASK))


def _mount(task: PipelineTask, here: Placement) -> None:
    """Scratch disk, /dev/shm and the CA bundle."""
    from kfp import kubernetes

    pool, scratch = here.pool, here.pool.scratch
    if scratch.claim:
        kubernetes.mount_pvc(task, scratch.claim, SCRATCH)
    elif scratch.storage_class:
        kubernetes.add_ephemeral_volume(
            task, "scratch", SCRATCH, ["ReadWriteOnce"], scratch.size, scratch.storage_class
        )
    else:
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH, size_limit=scratch.size)
    if pool.shm:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=pool.shm)
    if here.network.ca_config_map:
        kubernetes.use_config_map_as_volume(task, here.network.ca_config_map, CA_FOLDER)
