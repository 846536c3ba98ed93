"""What every way to run a job on a cluster has in common: its state, its identity, and who owns it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from torchx.specs import AppDef, Role, macros

from k2.errors import UserError
from k2.launch.app import resources_of
from k2.launch.cluster import Cluster, Kind, Object
from k2.platform.pods import QUEUE_LABEL

DIGEST = "k2.dev/spec-digest"
"""Annotation: SHA-256 of what the job was asked to be. Servers fill in defaults, so objects cannot be compared."""

RESTARTS = 3
"""Times that the pods of a job may fail before the job does; lost nodes do not count where the cluster tells."""


class State(StrEnum):
    """Where a job is. SUSPENDED: its queue has not admitted it, or took its place away again."""

    SUSPENDED = "suspended"
    PENDING = "pending"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether the job stays as it is."""
        return self in (State.COMPLETE, State.FAILED)


@dataclass(frozen=True)
class Status:
    """A job's state, and what its cluster says about it."""

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Terms:
    """What a job is besides its application.

    Attributes:
        queue: Kueue LocalQueue that admits it; it is then created suspended.
        deadline_s: seconds that it may be active, waiting for nodes included unless a queue admits it.
        runtime: kind and name of a TrainJob's runtime.
    """

    namespace: str
    queue: str | None = None
    deadline_s: int | None = None
    runtime: tuple[str, str] = ("ClusterTrainingRuntime", "torch-distributed")


class Backend(Protocol):
    """One way to run an application of one role as a job."""

    kind: Kind

    def job(self, app: AppDef, terms: Terms) -> Object:
        """The job's object."""

    def companions(self, job: Object) -> list[tuple[Kind, Object]]:
        """Objects that the job needs beside it; they belong to it, so that they go with it."""

    def status(self, job: Object) -> Status:
        """Where the job is."""

    def pods(self, name: str) -> Mapping[str, str]:
        """Labels of the job's pods."""


def only_role(app: AppDef) -> Role:
    """The application's role.

    Raises:
        UserError: it has several.
    """
    if len(app.roles) != 1:
        raise UserError(f"{app.name}: has the roles {', '.join(role.name for role in app.roles)}; a job has one")
    return app.roles[0]


def program(role: Role, app: str, node: str, host_in: str) -> Object:
    """The container's part that the application decides; `node` and `host_in` are torchx's macros."""
    filled = macros.Values(img_root="", app_id=app, replica_id=node, rank0_env=host_in).apply(role)
    return {
        "image": filled.image,
        "command": [filled.entrypoint],
        "args": filled.args,
        "env": [{"name": name, "value": value} for name, value in sorted(filled.env.items())],
        "resources": resources_of(role),
    }


def described(kind: str, api: str, app: AppDef, terms: Terms, spec: Object) -> Object:
    """A job's object with labels, queue and digest."""
    queue = {QUEUE_LABEL: terms.queue} if terms.queue else {}
    metadata = {"name": app.name, "namespace": terms.namespace, "labels": {**app.metadata, **queue}}
    body = {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return body | {"metadata": metadata | {"annotations": {DIGEST: digest}}}


def owned(body: Object, owner: Mapping[str, Any] | None) -> Object:
    """The object, deleted by the cluster when its owner is."""
    return body if owner is None else body | {"metadata": body["metadata"] | {"ownerReferences": [dict(owner)]}}


def owner_of(body: Object) -> Object | None:
    """The first owner that an object names."""
    found: list[Object] = body["metadata"].get("ownerReferences") or [None]
    return found[0]


def reference(body: Object) -> Object:
    """How other objects name this one as their owner."""
    return {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "name": body["metadata"]["name"],
        "uid": body["metadata"]["uid"],
    }


def create(cluster: Cluster, backend: Backend, body: Object) -> Object:
    """Create a job and what it needs."""
    made = cluster.create(backend.kind, body)
    complete(cluster, backend, made | {"apiVersion": body["apiVersion"], "kind": body["kind"]})
    return made


def complete(cluster: Cluster, backend: Backend, job: Object) -> None:
    """Create what a job needs and does not have, as when its launcher was stopped between two requests."""
    for kind, companion in backend.companions(job):
        if cluster.get(kind, companion["metadata"]["name"]) is None:
            cluster.create(kind, owned(companion, reference(job)))


def condition(body: Object, kind: str) -> Object | None:
    """A condition of an object that holds."""
    for each in body.get("status", {}).get("conditions") or ():
        if each["type"] == kind and each["status"] == "True":
            found: Object = each
            return found
    return None


def ended(body: Object) -> Status | None:
    """Whether an object of a job says that it is over, or suspended; the conditions are the same for all kinds."""
    for kind, state in (("Failed", State.FAILED), ("Complete", State.COMPLETE), ("Suspended", State.SUSPENDED)):
        found = condition(body, kind)
        if found:
            texts = (found.get("reason"), found.get("message"))
            return Status(state, ": ".join(text for text in texts if text))
    return None
