"""Kubeflow Trainer v2: a TrainJob on a training runtime, which its operator makes into a JobSet."""

from collections.abc import Mapping

from torchx.specs import AppDef

from k2.launch.app import pod_of
from k2.launch.backend import State, Status, Terms, described, ended, only_role, program
from k2.launch.cluster import TRAIN_JOBS, Kind, Object
from k2.launch.pod import CONTAINER, with_program

MANAGER = "k2.dev/launcher"
NODE_INDEX = "$(JOB_COMPLETION_INDEX)"
HOST = "PET_MASTER_ADDR"
"""Set by Trainer's torch plugin. It reserves all PET_ variables: its webhook refuses a TrainJob that sets one."""

PATCHED = (
    "imagePullSecrets",
    "nodeSelector",
    "securityContext",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "volumes",
)
"""What a TrainJob may change in its runtime's pods; all else is the runtime's business."""


class TrainJob:
    """One TrainJob, whose trainer has a node for each of the role's replicas."""

    kind = TRAIN_JOBS

    def job(self, app: AppDef, terms: Terms) -> Object:
        """The TrainJob: the application as its trainer, the pod's placement as a patch of the runtime."""
        role, (kind, runtime) = only_role(app), terms.runtime
        pod = with_program(pod_of(role), program(role, app.name, NODE_INDEX, HOST), app.metadata)
        container = pod["spec"]["containers"][0]
        trainer = {field: container[field] for field in ("image", "command", "args", "env")}
        spec = {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": kind, "name": runtime},
            "suspend": terms.queue is not None,
            "trainer": trainer | {"numNodes": role.num_replicas, "resourcesPerNode": container["resources"]},
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": _patch(pod)}}}],
        }
        deadline = {"activeDeadlineSeconds": terms.deadline_s} if terms.deadline_s else {}
        return described("TrainJob", TRAIN_JOBS.api, app, terms, spec | deadline)

    def companions(self, job: Object) -> list[tuple[Kind, Object]]:
        """None: its operator makes the Service."""
        return []

    def status(self, job: Object) -> Status:
        """From the conditions, and how many of its Jobs are ready."""
        found = ended(job)
        if found:
            return found
        if job["spec"].get("suspend"):
            return Status(State.SUSPENDED)
        jobs = job.get("status", {}).get("jobsStatus") or ()
        running = any(each["name"] == CONTAINER and (each["ready"] or each["succeeded"]) for each in jobs)
        return Status(State.RUNNING if running else State.PENDING)

    def pods(self, name: str) -> Mapping[str, str]:
        """The JobSet controller's labels."""
        return {"jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": CONTAINER}


def _patch(pod: Object) -> Object:
    """A JobSet's specification that says only what differs from the runtime."""
    container = pod["spec"]["containers"][0]
    ours = {field: container[field] for field in ("name", "securityContext", "volumeMounts") if field in container}
    spec = {field: pod["spec"][field] for field in PATCHED if field in pod["spec"]} | {"containers": [ours]}
    nodes = {"template": {"spec": {"template": {"metadata": pod["metadata"], "spec": spec}}}}
    return {"replicatedJobs": [{"name": CONTAINER, **nodes}]}
