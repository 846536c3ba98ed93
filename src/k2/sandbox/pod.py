"""Sandboxes as pods of a cluster: each with its own user, without identity or network, deleted when it ends.

Files come through a ConfigMap that belongs to the pod, so nothing is executed in a running container and deleting the
pod deletes all. That no network reaches it is the policy `k2-sandbox` of the platform and the cluster's network plugin.
"""

import base64
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from k2.config.deployment import Deployment
from k2.config.quantity import amount
from k2.errors import StageError, UserError
from k2.launch.cluster import CONFIG_MAPS, PODS, Cluster, ClusterError, Kind, Object
from k2.launch.launcher import owner
from k2.launch.pod import CONTAINER, restricted, waits_for
from k2.platform.pods import RUN_LABEL
from k2.sandbox.contract import Exceeded, Limits, Result
from k2.sandbox.inside import GIVEN

ACCOUNT = "k2-sandbox"
"""Service account of the pods; it may do nothing, and its token is not mounted."""

LABELS = {
    "app.kubernetes.io/name": "k2",
    "app.kubernetes.io/part-of": "k2",
    "app.kubernetes.io/component": "sandbox",
    "sidecar.istio.io/inject": "false",
}
FILES_BYTES = 1_000_000
"""What fits into a ConfigMap."""

FOLDER = "/work"
POLL_S = 0.5
START_S = 300.0
"""Seconds that a node, its image and the container's start may take."""

USERS = range(2**20, 2**30)
"""Users of pods, one each: the kernel counts a user's processes over the whole node."""


class PodSandbox:
    """Runs programs in pods of one namespace."""

    def __init__(
        self, cluster: Cluster, deployment: Deployment, *, poll_s: float = POLL_S, start_s: float = START_S
    ) -> None:
        """Raises UserError when the deployment has no `sandbox`."""
        if deployment.sandbox is None:
            raise UserError("sandbox: the deployment file does not say where sandboxes run; `sandbox: {}` is enough")
        self._cluster, self._deployment, self._where = cluster, deployment, deployment.sandbox
        self._poll_s, self._start_s = poll_s, start_s

    def run(self, program: Sequence[str], files: Mapping[str, bytes], limits: Limits) -> Result:
        """As `k2.sandbox.contract.Sandbox`; the pod is gone when this returns or raises."""
        names = _checked(files)
        name = f"k2-sandbox-{secrets.token_hex(8)}"
        try:
            self._create(PODS, self.pod(name, program, names, limits))
            self._create(CONFIG_MAPS, _config_map(self._found(name), names, files))
            return self._result(self._ended(name, limits), limits)
        finally:
            self._cluster.delete(PODS, name)

    def _create(self, kind: Kind, body: Object) -> None:
        """A new object. One that is there was made by a request whose answer was lost: nobody else has its name."""
        try:
            self._cluster.create(kind, body)
        except ClusterError as error:
            if error.status != 409:
                raise

    def _found(self, name: str) -> Object:
        pod = self._cluster.get(PODS, name)
        if pod is None:
            raise StageError(f"the sandbox {name} was deleted before it ended")
        return pod

    def _ended(self, name: str, limits: Limits) -> Object:
        """The pod once it has ended, or has run for so long that its node must be gone."""
        pending, running = time.monotonic() + self._start_s, time.monotonic() + 2 * self._start_s + limits.wall_s
        while True:
            pod = self._found(name)
            phase = pod["status"].get("phase")
            if phase in ("Succeeded", "Failed"):
                return pod
            if time.monotonic() > (running if phase == "Running" else pending):
                raise StageError(f"the sandbox {name} is still {phase}: {waits_for(pod) or 'its node does not answer'}")
            time.sleep(self._poll_s)

    def _result(self, pod: Object, limits: Limits) -> Result:
        status, name = pod["status"], pod["metadata"]["name"]
        ended = next((each["state"].get("terminated") or {} for each in status.get("containerStatuses") or ()), {})
        exceeded = _exceeded(status, ended)
        if "exitCode" not in ended and not exceeded:
            raise StageError(
                f"the sandbox {name} ended without a result: {status.get('message') or status.get('reason')}"
            )
        # The log of an evicted pod is gone.
        kept = status.get("reason") != "Evicted"
        output = self._cluster.output(name, CONTAINER, limits.output_bytes) if kept else b""
        return Result(int(ended.get("exitCode", 137)), output.decode(errors="replace"), exceeded)

    def pod(self, name: str, program: Sequence[str], names: Mapping[str, str], limits: Limits) -> Object:
        """The pod of one program; `names`: key in the ConfigMap of the same name -> file."""
        identity, where = self._deployment.identity, self._where
        user = None if identity.user is None else secrets.choice(USERS)
        pod = restricted(user, user)
        mine = owner(self._cluster)
        run = {RUN_LABEL: str(mine["name"])} if mine else {}
        pod["metadata"] |= {"name": name, "labels": LABELS | self._deployment.paid_by() | run}
        pod["metadata"] |= {"ownerReferences": [mine]} if mine else {}
        optional = {
            "nodeSelector": dict(sorted(where.node_labels.items())),
            "tolerations": [taint.manifest() for taint in where.tolerations],
            "imagePullSecrets": [{"name": each} for each in self._deployment.pull_secrets],
            "runtimeClassName": where.runtime_class,
        }
        pod["spec"] |= {field: value for field, value in optional.items() if value} | {
            "serviceAccountName": ACCOUNT,
            "activeDeadlineSeconds": math.ceil(limits.wall_s + self._start_s),
            "terminationGracePeriodSeconds": 1,
            "volumes": _volumes(name, names, limits),
        }
        supervisor = ["python", "-m", "k2.sandbox.inside", limits.wall_s, limits.processes, limits.output_bytes]
        pod["spec"]["containers"][0] |= {
            "image": self._deployment.images[where.image],
            # Kubernetes would put variables in place of `$(NAME)`.
            "command": [*map(str, supervisor), *(word.replace("$", "$$") for word in program)],
            "workingDir": FOLDER,
            "resources": _resources(limits),
            "volumeMounts": [
                {"name": "files", "mountPath": str(GIVEN), "readOnly": True},
                {"name": "work", "mountPath": FOLDER},
                {"name": "tmp", "mountPath": "/tmp"},
            ],
        }
        return {"apiVersion": "v1", "kind": "Pod", **pod}


def _checked(files: Mapping[str, bytes]) -> dict[str, str]:
    """Key in the ConfigMap -> file's name."""
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or any(part.startswith("..") for part in path.parts):
            raise UserError(f"file {name!r}: leads out of the sandbox's folder; give a relative path without `..`")
    size = sum(map(len, files.values()))
    if size > FILES_BYTES:
        raise UserError(f"files of {size} bytes: a sandbox takes {FILES_BYTES}")
    return {f"file-{number}": name for number, name in enumerate(sorted(files))}


def _config_map(pod: Object, names: Mapping[str, str], files: Mapping[str, bytes]) -> Object:
    """The files as an object that goes when the pod goes."""
    mine = {"apiVersion": "v1", "kind": "Pod"} | {field: pod["metadata"][field] for field in ("name", "uid")}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": pod["metadata"]["name"], "labels": LABELS, "ownerReferences": [mine]},
        "binaryData": {key: base64.b64encode(files[name]).decode() for key, name in names.items()},
    }


def _volumes(name: str, names: Mapping[str, str], limits: Limits) -> list[dict[str, Any]]:
    items = [{"key": key, "path": path} for key, path in names.items()]
    return [
        {"name": "files", "configMap": {"name": name, "items": items} if items else {"name": name}},
        *({"name": each, "emptyDir": {"sizeLimit": limits.disk}} for each in ("work", "tmp")),
    ]


def _resources(limits: Limits) -> dict[str, dict[str, str]]:
    """Requests are limits: what a program uses is nobody else's. Disk: two folders, and the log."""
    disk = math.ceil(2 * amount(limits.disk) + 2 * limits.output_bytes)
    sizes = {"cpu": limits.cpu, "memory": limits.memory, "ephemeral-storage": str(disk)}
    return {"requests": sizes, "limits": dict(sizes)}


def _exceeded(status: Object, ended: Object) -> Exceeded:
    """The limit that ended a pod, as its cluster or its first process says."""
    said = str(status.get("message", ""))
    if status.get("reason") == "DeadlineExceeded":
        return "time"
    if status.get("reason") == "Evicted" and ("ephemeral" in said or "emptyDir" in said):
        return "disk"
    if ended.get("reason") == "OOMKilled":
        return "memory"
    messages: dict[str, Exceeded] = {"time": "time", "output": "output"}
    return messages.get(str(ended.get("message", "")), "")
