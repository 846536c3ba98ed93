"""`k2 doctor`: whether this machine, and with --cluster the cluster, has what K2 needs."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from k2.commands.options import echo, json_output
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.config.deployment import Deployment

TIMEOUT_S = 10

OPERATORS = {
    "trainer.kubeflow.org/v1alpha1": "Kubeflow Trainer 2.x, for stages of many nodes",
    "kueue.x-k8s.io/v1beta2": "Kueue 0.15 or later, for queues",
    "argoproj.io/v1alpha1": "Argo Workflows, under Kubeflow Pipelines",
    "monitoring.coreos.com/v1": "the Prometheus operator, for metrics and alerts",
    "external-secrets.io/v1": "the External Secrets Operator",
}
"""API group and version -> what serves it. Every one may be absent; what needs it is then left out."""

TRAINER, KUEUE = "trainer.kubeflow.org/v1alpha1", "kueue.x-k8s.io/v1beta2"

FIXES = {
    "Secret": "`kubectl create secret` makes it, or name another",
    "ConfigMap": "`kubectl create configmap` makes it, or name another",
    "RuntimeClass": "the nodes' administrator makes it, or name another",
    "LocalQueue": "manifests/components/kueue has queues, or name another",
    "ClusterTrainingRuntime": "manifests/admin/components/trainer has it, or name another",
    "TrainingRuntime": "manifests/components/trainer has it, or name another",
}

NATIVE = "pipelines.kubeflow.org/v2beta1"
"""Served only where Kubeflow Pipelines keeps pipelines as Kubernetes resources."""

Rights = tuple[tuple[str, str, tuple[str, ...]], ...]
NEEDED: Rights = (
    ("trainer.kubeflow.org", "trainjobs", ("create", "delete", "get", "list")),
    ("batch", "jobs", ("create", "delete", "get", "list")),
    ("", "services", ("create", "get")),
    ("", "pods", ("get", "list")),
    ("", "pods/log", ("get",)),
    ("kueue.x-k8s.io", "workloads", ("list",)),
    ("kueue.x-k8s.io", "localqueues", ("get",)),
    ("argoproj.io", "workflows", ("get",)),
)
"""What a launcher step does: API group, resource, verbs. The Role k2-launcher grants exactly this."""

SANDBOX: Rights = (
    ("", "pods", ("create", "delete", "get")),
    ("", "pods/log", ("get",)),
    ("", "configmaps", ("create",)),
)
"""What a step that runs sandboxes does; the Role k2-sandbox grants it."""


@dataclass(frozen=True)
class Finding:
    """One check: `absent` is a part that may be missing, `failed` is one that may not."""

    check: str
    state: Literal["ok", "absent", "failed"]
    detail: str


@click.command()
@click.option("--cluster", is_flag=True, help="Check the Kubernetes cluster of the current credentials too.")
@click.option("--namespace", default="kubeflow", show_default=True, help="Where runs live.")
@click.option("--account", help="Ask for the rights of this service account, such as pipeline-runner, not one's own.")
@click.option(
    "--deployment", "file", type=click.Path(path_type=Path), help="Check that what this deployment file names is there."
)
@json_output
def doctor(cluster: bool, namespace: str, account: str | None, file: Path | None, as_json: bool) -> None:
    """Check this machine: Python, packages, disk, object store; with --cluster, Kubernetes: rights, operators, names.

    Exit code 1 when something that must be there is missing.
    """
    checks = machine()
    found = list(inspect_cluster(namespace, account, _deployment(file))) if cluster else []
    rows = [f"{name:<16}{value}" for name, value in checks.items()]
    rows += [f"{each.state:<8}{each.check}: {each.detail}" for each in found]
    echo(checks | ({"cluster": [asdict(each) for each in found]} if cluster else {}), as_json, "\n".join(rows))
    if any(each.state == "failed" for each in found):
        sys.exit(1)


def machine() -> dict[str, Any]:
    """What this machine has; starts the embedded object store when no other is named."""
    from k2.execution.local import k2_home, object_store

    home = k2_home()
    home.mkdir(parents=True, exist_ok=True)
    with object_store() as store:
        return {
            "python": sys.version.split()[0],
            "cpu": len(os.sched_getaffinity(0)),
            "torch": importlib.metadata.version("torch"),
            "kfp": importlib.metadata.version("kfp"),
            "disk_free_bytes": shutil.disk_usage(home).free,
            "store": store.settings.endpoint,
        }


def inspect_cluster(namespace: str, account: str | None, deployment: "Deployment | None") -> Iterator[Finding]:
    """The cluster's operators, delivery mode, the launcher's rights, and the names that a deployment file uses.

    Raises:
        UserError: no credentials, or the API server does not answer.
    """
    from kubernetes import client  # type: ignore[import-untyped]
    from urllib3.exceptions import HTTPError

    from k2.launch.cluster import connect

    api = connect(f"system:serviceaccount:{namespace}:{account}" if account else None)
    try:
        version = client.VersionApi(api).get_code(_request_timeout=TIMEOUT_S)
        served = _served(api)
        yield Finding("Kubernetes", "ok", f"{version.git_version} at {api.configuration.host}")
        for group, what in OPERATORS.items():
            yield Finding(group, "ok" if group in served else "absent", what)
        yield _delivery(served)
        groups = {group.partition("/")[0] for group in served}
        yield from _rights(api, namespace, groups, "k2-launcher", NEEDED)
        if deployment is not None and deployment.sandbox:
            yield from _rights(api, namespace, groups, "k2-sandbox", SANDBOX)
        if deployment is not None:
            yield from _operators(served, deployment)
            yield from _names(api, namespace, deployment)
    except (client.ApiException, HTTPError) as error:
        raise UserError(f"{api.configuration.host}: {_one_line(error)}; check the credentials and --account") from None


def _served(api: Any) -> set[str]:
    """Every API group with its versions, and `v1`, as the server says."""
    from kubernetes import client

    groups = client.ApisApi(api).get_api_versions(_request_timeout=TIMEOUT_S).groups
    return {version.group_version for group in groups for version in group.versions} | {"v1"}


def _delivery(served: set[str]) -> Finding:
    if NATIVE in served:
        return Finding("delivery", "ok", "Kubernetes-native: apply the resources that `k2 pipeline compile` renders")
    return Finding("delivery", "ok", "database: `k2 pipeline upload`, or the chart's `delivery: upload`")


def _rights(api: Any, namespace: str, groups: set[str], role: str, needed: Rights) -> Iterator[Finding]:
    for group, resource, verbs in needed:
        if group and group not in groups:
            continue
        name = f"{resource}.{group}" if group else resource
        missing = [verb for verb in verbs if not _allowed(api, namespace, group, resource, verb)]
        detail = f"missing: {', '.join(missing)}; the Role {role} grants them" if missing else ", ".join(verbs)
        yield Finding(f"may {name} in {namespace}", "failed" if missing else "ok", detail)


def _allowed(api: Any, namespace: str, group: str, resource: str, verb: str) -> bool:
    from kubernetes import client

    kind, _, sub = resource.partition("/")
    asked = client.V1ResourceAttributes(namespace=namespace, verb=verb, group=group, resource=kind, subresource=sub)
    review = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=asked))
    answer = client.AuthorizationV1Api(api).create_self_subject_access_review(review, _request_timeout=TIMEOUT_S)
    return bool(answer.status.allowed)


def _operators(served: set[str], deployment: "Deployment") -> Iterator[Finding]:
    """What the pools need somebody to serve."""
    for name, pool in deployment.pools.items():
        if pool.launch == "trainjob" and TRAINER not in served:
            fix = "install Kubeflow Trainer 2, or set launch: job"
            yield Finding(f"pools.{name}.launch", "failed", f"nothing serves {TRAINER}; {fix}")
        if pool.queue and KUEUE not in served:
            yield Finding(
                f"pools.{name}.queue", "failed", f"nothing serves {KUEUE}; install Kueue, or remove the queue"
            )


def _names(api: Any, namespace: str, deployment: "Deployment") -> Iterator[Finding]:
    """Secrets, ConfigMaps, queues and runtimes that the file names, each once, with the field that names it."""
    core, queues = f"/api/v1/namespaces/{namespace}", f"/apis/{KUEUE}/namespaces/{namespace}"
    named = [("Secret", deployment.store.secret, "store.secret", f"{core}/secrets")]
    named += [("Secret", name, "pull_secrets", f"{core}/secrets") for name in deployment.pull_secrets]
    named += [("Secret", key.secret, f"secrets.{each}", f"{core}/secrets") for each, key in deployment.secrets.items()]
    bundle = deployment.network.ca_config_map
    named += [("ConfigMap", bundle, "network.ca_config_map", f"{core}/configmaps")] if bundle else []
    if deployment.sandbox and deployment.sandbox.runtime_class:
        classes = "/apis/node.k8s.io/v1/runtimeclasses"
        named.append(("RuntimeClass", deployment.sandbox.runtime_class, "sandbox.runtime_class", classes))
    named += [("LocalQueue", name, "queues", f"{queues}/localqueues") for name in deployment.queues]
    for name, pool in deployment.pools.items():
        if pool.launch == "trainjob":
            runtime, place = pool.runtime, f"/namespaces/{namespace}" if pool.runtime.kind == "TrainingRuntime" else ""
            folder = f"/apis/{TRAINER}{place}/{runtime.kind.lower()}s"
            named.append((runtime.kind, runtime.name, f"pools.{name}.runtime", folder))
    for kind, name, field, folder in sorted({each[:2]: each for each in reversed(named)}.values()):
        problem = f"{field}: there is none in {namespace}; {FIXES[kind]}"
        yield _exists(api, f"{kind} {name}", f"{folder}/{name}", namespace, problem)


def _exists(api: Any, name: str, path: str, namespace: str, problem: str) -> Finding:
    from kubernetes import client

    try:
        api.call_api(path, "GET", auth_settings=["BearerToken"], response_type="object", _request_timeout=TIMEOUT_S)
    except client.ApiException as error:
        if error.status == 403:
            return Finding(name, "absent", "these credentials may not look; ask with others")
        if error.status == 404:
            return Finding(name, "failed", problem)
        raise
    return Finding(name, "ok", f"is in {namespace}")


def _deployment(file: Path | None) -> "Deployment | None":
    from k2.config.deployment import Deployment
    from k2.platform.documents import read_section

    return read_section(file, Deployment) if file else None


def _one_line(error: Exception) -> str:
    status = getattr(error, "status", None)
    return f"HTTP {status} {getattr(error, 'reason', '')}" if status else str(error).splitlines()[0]


COMMANDS = (doctor,)
