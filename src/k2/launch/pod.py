"""The pod of one node of a job: as restricted as a pod can be, placed by its pool, with secrets by name only.

A pod template is what every scheduler of torchx builds on; image, command, plain variables and resources are the
application's own (`k2.launch.app`).
"""

import copy
from collections.abc import Mapping
from typing import Any

from k2.config.deployment import Placement, Pool
from k2.platform.pods import CA_FOLDER, METRICS_PORT, METRICS_TOKEN, QUEUE_LABEL, SCRATCH, labels, secret_variables

CONTAINER = "node"
"""Name of the container, and of Kubeflow Trainer's replicated job."""

ACCOUNT = "k2-rank"
"""Service account of the pods; it may do nothing, and its token is not mounted."""

TOPOLOGY = "kueue.x-k8s.io/podset-{}-topology"
"""Annotations by which Kueue keeps the pods of a job together."""


def restricted(user: int | None, group: int | None) -> dict[str, Any]:
    """A pod that Pod Security `restricted` admits, without image, command and resources."""
    ids = {"runAsUser": user, "runAsGroup": group, "fsGroup": group}
    who = {name: number for name, number in ids.items() if number is not None}
    container = {
        "name": CONTAINER,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "metadata": {"annotations": {"sidecar.istio.io/inject": "false"}},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}} | who,
            "containers": [container],
        },
    }


def with_program(pod: Mapping[str, Any], program: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """A copy of a pod template whose container runs a program: its image, command, resources and variables."""
    filled = copy.deepcopy(dict(pod))
    container = filled["spec"]["containers"][0]
    together = {field: [*program.get(field, []), *container.get(field, [])] for field in ("env", "ports")}
    whole = container | dict(program) | together
    filled["spec"]["containers"][0] = {field: value for field, value in whole.items() if value != []}
    filled["metadata"]["labels"] = {**labels, **filled["metadata"].get("labels", {})}
    return filled


def waits_for(pod: Mapping[str, Any]) -> str:
    """Why a pod does not run yet, as its cluster says; empty when it says nothing."""
    told = pod.get("status", {})
    waiting = [each.get("state", {}).get("waiting", {}) for each in told.get("containerStatuses") or ()]
    conditions = [each for each in told.get("conditions") or () if each["status"] == "False"]
    texts = [f"{each.get('reason', '')}: {each.get('message', '')}" for each in (*waiting, *conditions) if each]
    return next((text.strip(": ") for text in texts), "")


def template(here: Placement) -> dict[str, Any]:
    """Labels, placement, volumes and secrets of a pod of this placement."""
    pod, pool = restricted(here.identity.user, here.identity.group), here.pool
    pod["metadata"]["labels"] = {key: value for key, value in labels(here).items() if key != QUEUE_LABEL}
    pod["metadata"]["annotations"] |= {TOPOLOGY.format(how): label for how, label in pool.topology.items()}
    pod["spec"] |= {"serviceAccountName": ACCOUNT, **_placed(here), "volumes": _volumes(here)}
    pod["spec"]["containers"][0] |= {
        "env": _secrets(here),
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}] if METRICS_TOKEN in here.secrets else [],
        "volumeMounts": _mounts(here),
    }
    return pod


def _placed(here: Placement) -> dict[str, Any]:
    """Which nodes, and how the pod ends there."""
    pool = here.pool
    known = {
        "nodeSelector": dict(sorted(pool.node_labels.items())),
        "tolerations": [taint.manifest() for taint in pool.tolerations],
        "imagePullSecrets": [{"name": name} for name in here.pull_secrets],
        "runtimeClassName": pool.runtime_class,
        "terminationGracePeriodSeconds": pool.grace_s,
    }
    return {name: value for name, value in known.items() if value not in (None, [], {})}


def _secrets(here: Placement) -> list[dict[str, Any]]:
    """Variables from Secrets, in a stable order."""
    pairs = {
        variable: {"name": secret, "key": key}
        for secret, keys in secret_variables(here).items()
        for key, variable in keys.items()
    }
    return [{"name": name, "valueFrom": {"secretKeyRef": pairs[name]}} for name in sorted(pairs)]


def _volumes(here: Placement) -> list[dict[str, Any]]:
    """Scratch disk, /dev/shm and the CA bundle.

    Not named like a training runtime's volumes: merged with one of another kind, a volume would be of two kinds.
    """
    found: list[dict[str, Any]] = [{"name": "k2-scratch", **_scratch(here.pool)}]
    if here.pool.shm:
        found.append({"name": "k2-shm", "emptyDir": {"medium": "Memory", "sizeLimit": here.pool.shm}})
    if here.network.ca_config_map:
        found.append({"name": "k2-ca", "configMap": {"name": here.network.ca_config_map}})
    return found


def _scratch(pool: Pool) -> dict[str, Any]:
    scratch = pool.scratch
    if scratch.claim:
        return {"persistentVolumeClaim": {"claimName": scratch.claim}}
    if not scratch.storage_class:
        return {"emptyDir": {"sizeLimit": scratch.size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": scratch.storage_class,
        "resources": {"requests": {"storage": scratch.size}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _mounts(here: Placement) -> list[dict[str, Any]]:
    """The root file system is read-only, so /tmp is on the scratch disk."""
    found: list[dict[str, Any]] = [
        {"name": "k2-scratch", "mountPath": SCRATCH},
        {"name": "k2-scratch", "mountPath": "/tmp", "subPath": "tmp"},
    ]
    if here.pool.shm:
        found.append({"name": "k2-shm", "mountPath": "/dev/shm"})
    if here.network.ca_config_map:
        found.append({"name": "k2-ca", "mountPath": CA_FOLDER, "readOnly": True})
    return found
