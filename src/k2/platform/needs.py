"""What a deployment needs its cluster to have and to allow, each with the field of the file that asks for it.

Nothing is looked up here (`k2.launch.preflight` does): the first step of a rendered pipeline gets this as JSON.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from k2.config.deployment import STAGE_NAMES, Deployment, Placement
from k2.platform.pods import secret_variables

TRAINER, KUEUE = "trainer.kubeflow.org/v1alpha1", "kueue.x-k8s.io/v1beta2"

Rights = tuple[tuple[str, str, tuple[str, ...]], ...]
"""API group, resource, verbs."""

LAUNCHER: Rights = (
    ("trainer.kubeflow.org", "trainjobs", ("create", "delete", "get", "list")),
    ("batch", "jobs", ("create", "delete", "get", "list")),
    ("", "services", ("create", "get")),
    ("", "pods", ("get", "list")),
    ("", "pods/log", ("get",)),
    ("kueue.x-k8s.io", "workloads", ("list",)),
    ("kueue.x-k8s.io", "localqueues", ("get",)),
    ("argoproj.io", "workflows", ("get",)),
)
"""What a launcher step does. The Role k2-launcher grants exactly this."""

SANDBOX: Rights = (
    ("", "pods", ("create", "delete", "get")),
    ("", "pods/log", ("get",)),
    ("", "configmaps", ("create",)),
)
"""What a step that runs sandboxes does; the Role k2-sandbox grants exactly this."""


class Sort(NamedTuple):
    """One kind of objects that a deployment file names, and what to do when one is not there."""

    api: str
    plural: str
    fix: str
    namespaced: bool = True


SORTS = {
    "Secret": Sort("v1", "secrets", "`kubectl create secret` makes it, or name another"),
    "ConfigMap": Sort("v1", "configmaps", "`kubectl create configmap` makes it, or name another"),
    "PersistentVolumeClaim": Sort("v1", "persistentvolumeclaims", "create it, or name a storage_class instead"),
    "RuntimeClass": Sort(
        "node.k8s.io/v1", "runtimeclasses", "the nodes' administrator makes it, or name another", False
    ),
    "LocalQueue": Sort(KUEUE, "localqueues", "manifests/components/kueue has queues, or name another"),
    "ClusterTrainingRuntime": Sort(
        TRAINER, "clustertrainingruntimes", "manifests/admin/components/trainer has it, or name another", False
    ),
    "TrainingRuntime": Sort(TRAINER, "trainingruntimes", "manifests/components/trainer has it, or name another"),
}


class Named(BaseModel):
    """One object that a field names, and the keys that it must have; `sort` is one of `SORTS`."""

    model_config = ConfigDict(frozen=True)

    sort: str
    name: str
    field: str
    keys: tuple[str, ...] = ()


class Needs(BaseModel):
    """All of it.

    Attributes:
        named: objects that fields name.
        served: field -> API that somebody must serve for it.
        rights: what launchers must be allowed.
    """

    model_config = ConfigDict(frozen=True)

    named: tuple[Named, ...] = ()
    served: dict[str, str] = {}
    rights: Rights = ()


def of_placement(here: Placement) -> Needs:
    """What one task needs: a step's pod, or a launcher and its job."""
    pool, where = here.pool, f"pools.{here.pool_name}"
    served = {f"{where}.launch": TRAINER} if pool.launch == "trainjob" else {}
    served |= {f"{where}.queue": KUEUE} if pool.queue else {}
    return Needs(named=tuple(_named(here)), served=served, rights=_rights(here))


def of_deployment(deployment: Deployment) -> Needs:
    """What all tasks of a run need together, and its sandboxes."""
    each = [of_placement(deployment.placement(task)) for task in ("configure", *STAGE_NAMES)]
    named = [one for needs in each for one in needs.named]
    if deployment.sandbox and deployment.sandbox.runtime_class:
        named.append(Named(sort="RuntimeClass", name=deployment.sandbox.runtime_class, field="sandbox.runtime_class"))
    asked = {right for needs in each for right in needs.rights}
    return Needs(
        named=_merged(named),
        served={field: api for needs in each for field, api in needs.served.items()},
        rights=tuple(right for right in LAUNCHER if right in asked),
    )


def _named(here: Placement) -> Iterator[Named]:
    pool, where = here.pool, f"pools.{here.pool_name}"
    fields = {key.secret: f"secrets.{variable}" for variable, key in reversed(here.secrets.items())}
    for secret, keys in secret_variables(here).items():
        field = "store.secret" if secret == here.store.secret else fields[secret]
        yield Named(sort="Secret", name=secret, field=field, keys=tuple(keys))
    for secret in here.pull_secrets:
        yield Named(sort="Secret", name=secret, field="pull_secrets")
    if here.network.ca_config_map:
        bundle, key = here.network.ca_config_map, here.network.ca_key
        yield Named(sort="ConfigMap", name=bundle, field="network.ca_config_map", keys=(key,))
    if pool.scratch.claim:
        yield Named(sort="PersistentVolumeClaim", name=pool.scratch.claim, field=f"{where}.scratch.claim")
    if pool.runtime_class:
        yield Named(sort="RuntimeClass", name=pool.runtime_class, field=f"{where}.runtime_class")
    if pool.queue:
        yield Named(sort="LocalQueue", name=pool.queue, field=f"{where}.queue")
    if pool.launch == "trainjob":
        yield Named(sort=pool.runtime.kind, name=pool.runtime.name, field=f"{where}.runtime")


def _rights(here: Placement) -> Rights:
    pool = here.pool
    if pool.launch == "pod":
        return ()
    used = {"pods", "pods/log", "workflows", "trainjobs" if pool.launch == "trainjob" else "jobs"}
    used |= {"services"} if pool.launch == "job" and pool.nodes > 1 else set()
    used |= {"workloads", "localqueues"} if pool.queue else set()
    return tuple(right for right in LAUNCHER if right[1] in used)


def _merged(named: Iterable[Named]) -> tuple[Named, ...]:
    """Each object once, with the first field that names it and all keys that any needs."""
    found: dict[tuple[str, str], Named] = {}
    for each in named:
        before = found.setdefault((each.sort, each.name), each)
        keys = tuple(sorted({*before.keys, *each.keys}))
        found[each.sort, each.name] = before.model_copy(update={"keys": keys})
    return tuple(found[key] for key in sorted(found))
