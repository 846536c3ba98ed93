"""`k2 doctor`: whether this machine, and with --cluster the cluster, has what K2 needs."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2.commands.options import echo, json_output
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.config.deployment import Deployment
    from k2.launch.preflight import Finding

OPERATORS = {
    "trainer.kubeflow.org/v1alpha1": "Kubeflow Trainer 2.x, for stages of many nodes",
    "kueue.x-k8s.io/v1beta2": "Kueue 0.15 or later, for queues",
    "argoproj.io/v1alpha1": "Argo Workflows, under Kubeflow Pipelines",
    "monitoring.coreos.com/v1": "the Prometheus operator, for metrics and alerts",
    "external-secrets.io/v1": "the External Secrets Operator",
}
"""API group and version -> what serves it. Every one may be absent; what needs it is then left out."""

NATIVE = "pipelines.kubeflow.org/v2beta1"
"""Served only where Kubeflow Pipelines keeps pipelines as Kubernetes resources."""

NATIVE_WAY = "Kubernetes-native: apply the resources that `k2 pipeline compile` renders"
DATABASE_WAY = "database: `k2 pipeline upload`, or the chart's `delivery: upload`"


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


def inspect_cluster(namespace: str, account: str | None, deployment: "Deployment | None") -> "Iterator[Finding]":
    """The cluster's operators, delivery mode, the launcher's rights, and the names that a deployment file uses.

    Raises:
        UserError: no credentials, or the API server does not answer.
    """
    from k2.launch.cluster import Cluster, ClusterError, connect
    from k2.launch.preflight import Finding, rights, services, things
    from k2.platform.needs import LAUNCHER, SANDBOX, of_deployment

    user = f"system:serviceaccount:{namespace}:{account}" if account else None
    reached = Cluster(connect(user), namespace, patience_s=0.0)
    try:
        yield Finding("Kubernetes", "ok", f"{reached.version()} at {reached.api.configuration.host}")
        served = reached.served()
        for group, what in OPERATORS.items():
            yield Finding(group, "ok" if group in served else "absent", what)
        yield Finding("delivery", "ok", NATIVE_WAY if NATIVE in served else DATABASE_WAY)
        yield from rights(reached, served, "k2-launcher", LAUNCHER)
        if deployment is not None:
            yield from rights(reached, served, "k2-sandbox", SANDBOX) if deployment.sandbox else ()
            needs = of_deployment(deployment)
            yield from services(served, needs)
            yield from things(reached, served, needs)
    except ClusterError as error:
        raise UserError(f"{error}; check the credentials and --account") from None


def _deployment(file: Path | None) -> "Deployment | None":
    from k2.config.deployment import Deployment
    from k2.platform.documents import read_section

    return read_section(file, Deployment) if file else None


COMMANDS = (doctor,)
