"""Jobs of Kubernetes itself, for clusters without operators: an Indexed Job and a headless Service.

Pod i of job NAME is reached as NAME-i.NAME. A stage on one node is a plain Job without a Service.
"""

from collections.abc import Mapping

from torchx.specs import AppDef

from k2.launch.app import pod_of
from k2.launch.backend import RESTARTS, State, Status, Terms, described, ended, only_role, program
from k2.launch.cluster import JOBS, SERVICES, Kind, Object
from k2.launch.pod import with_program

HOST = "K2_RANK0_HOST"
USER_ERROR = 2
"""Exit code of a stage whose input is wrong: running it again changes nothing."""

KEEP_S = 86400
"""Seconds that an ended job and its logs stay, when nothing deletes them before."""


class IndexedJob:
    """One Job, each of whose pods is a node."""

    kind = JOBS

    def job(self, app: AppDef, terms: Terms) -> Object:
        """The Job. The first node meets the others by its name in the Service."""
        role, several = only_role(app), app.roles[0].num_replicas > 1
        container = program(role, app.name, "$(JOB_COMPLETION_INDEX)" if several else "0", HOST)
        container["env"].append({"name": HOST, "value": f"{app.name}-0.{app.name}" if several else "localhost"})
        pod = with_program(pod_of(role), container, app.metadata)
        if several:
            pod["spec"]["subdomain"] = app.name
        spec = {
            "parallelism": role.num_replicas,
            "completions": role.num_replicas,
            "completionMode": "Indexed" if several else "NonIndexed",
            "backoffLimit": RESTARTS * role.num_replicas,
            "podFailurePolicy": _failures(pod["spec"]["containers"][0]["name"]),
            "ttlSecondsAfterFinished": KEEP_S,
            "suspend": terms.queue is not None,
            "template": pod,
        }
        deadline = {"activeDeadlineSeconds": terms.deadline_s} if terms.deadline_s else {}
        return described("Job", JOBS.api, app, terms, spec | deadline)

    def companions(self, job: Object) -> list[tuple[Kind, Object]]:
        """The Service by which the pods of a job of several nodes find each other before they are ready."""
        if job["spec"]["completions"] == 1:
            return []
        name, labels = job["metadata"]["name"], job["metadata"].get("labels", {})
        body = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": job["metadata"]["namespace"], "labels": labels},
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": dict(self.pods(name))},
        }
        return [(SERVICES, body)]

    def status(self, job: Object) -> Status:
        """From the conditions, and how many pods are active and ready."""
        found, counts = ended(job), job.get("status", {})
        if found:
            return found
        if job["spec"].get("suspend"):
            return Status(State.SUSPENDED)
        active = counts.get("active", 0)
        # Servers before 1.24 do not count ready pods.
        running = active > 0 and counts.get("ready", active) > 0
        return Status(State.RUNNING if running or counts.get("succeeded", 0) else State.PENDING)

    def pods(self, name: str) -> Mapping[str, str]:
        """The Job controller's label."""
        return {"job-name": name}


def _failures(container: str) -> Object:
    """A user's error ends the job at once; a pod whose node was taken away does not count."""
    wrong = {"containerName": container, "operator": "In", "values": [USER_ERROR]}
    lost = {"type": "DisruptionTarget", "status": "True"}
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": wrong},
            {"action": "Ignore", "onPodConditions": [lost]},
        ]
    }
