"""Pods and jobs of the tests, made by the code that makes them in production."""

from typing import Any

from kubernetes import client

from k2.config.deployment import Deployment, Placement
from k2.launch.cluster import Cluster
from k2.launch.pod import template, with_program
from k2.platform.pods import LAUNCH_VARIABLE, environment, labels
from tests.e2e_k8s.cluster import SERVER, Object
from tests.e2e_k8s.conftest import RUNNER, SPACE, Platform

WORKFLOWS: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "workflows.argoproj.io"},
    "spec": {
        "group": "argoproj.io",
        "scope": "Namespaced",
        "names": {"kind": "Workflow", "plural": "workflows", "singular": "workflow"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}
"""Argo's runs, without the controller that would run them: here they only own pods and jobs."""


def cluster_of(platform: Platform, account: str) -> Cluster:
    """The namespace with the rights of an account."""
    settings = client.Configuration(host=SERVER)
    settings.ssl_ca_cert = str(platform.kubernetes.authority)
    settings.api_key = {"authorization": f"Bearer {platform.token(account)}"}
    return Cluster(client.ApiClient(settings), SPACE)


def placement(image: str, stage: str, **pool: Any) -> Placement:
    """Where a stage runs in a deployment of one image, with a pool of jobs and a pool of launchers."""
    sizes = {
        "job": {"cpu": 1, "memory": "3Gi", "launch": "job", **pool},
        "light": {"cpu": "100m", "memory": "1Gi"},
    }
    stages = {"stages": {stage: "job"}} if pool.get("launch", "job") == "job" else {}
    deployment: dict[str, Any] = {"images": {"cpu": image}, "store": {"secret": "k2-s3"}, "pools": sizes}
    return Deployment.model_validate(deployment | {"default_pool": "light"} | stages).placement(stage)


def pod(name: str, here: Placement, *program: str, **changes: Any) -> Object:
    """A pod of a placement that runs a program."""
    variables = [{"name": key, "value": value} for key, value in environment(here).items()]
    sizes = {"cpu": here.pool.cpu, "memory": here.pool.memory}
    command = {"image": here.image, "command": list(program), "env": variables}
    command |= {"resources": {"requests": sizes, "limits": dict(sizes)}}
    made = with_program(template(here), command, {})
    made["metadata"] |= {"name": name, "namespace": SPACE}
    made["spec"] |= changes
    return {"apiVersion": "v1", "kind": "Pod", **made}


def job(name: str, here: Placement, *program: str) -> Object:
    """A plain Job of one pod."""
    inside = pod(name, here, *program)
    spec = {"backoffLimit": 0, "template": {"metadata": {"labels": labels(here)}, "spec": inside["spec"]}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": SPACE}, "spec": spec}


def step(name: str, workflow: Object, here: Placement, *program: str) -> Object:
    """The pod of a pipeline step that launches a job: of a workflow, with Kubeflow's account."""
    light = placement(here.image, here.task, launch="pod")
    made = pod(name, light, *program, serviceAccountName=RUNNER, automountServiceAccountToken=True)
    own = {"name": "K2_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    launch = {"name": LAUNCH_VARIABLE, "value": here.model_dump_json(exclude_defaults=True)}
    made["spec"]["containers"][0]["env"] += [own, launch]
    made["metadata"]["labels"] |= {"workflows.argoproj.io/workflow": workflow["metadata"]["name"]}
    made["metadata"]["ownerReferences"] = [
        {
            "apiVersion": workflow["apiVersion"],
            "kind": "Workflow",
            "name": workflow["metadata"]["name"],
            "uid": workflow["metadata"]["uid"],
            "controller": True,
        }
    ]
    return made
