"""Every overlay renders, is valid for three Kubernetes minors, and is as restricted as the docs say."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from minio import Minio
from minio.error import MinioException
from urllib3 import PoolManager
from urllib3.exceptions import HTTPError

from k2.config.deployment import Deployment
from k2.config.quantity import amount
from k2.platform import pods
from k2.store.embedded import PORT_FLAGS, free_ports
from tests.manifests.render import (
    ROOT,
    Object,
    allowed,
    assert_restricted,
    is_custom,
    kustomize,
    name,
    pod_templates,
    selects,
    validate,
)

OVERLAYS = {"dev": "kubeflow", "prod": "kubeflow", "profile": "team-a"}
ADMIN = ("standalone", "profile")
PATHS = [*(f"manifests/overlays/{each}" for each in OVERLAYS), *(f"manifests/admin/overlays/{each}" for each in ADMIN)]
CLUSTER_SCOPED = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"} | {
    "ClusterTrainingRuntime"
}
K2 = {"app.kubernetes.io/part-of": "k2"}
STEP = K2 | {"app.kubernetes.io/component": "sft", "workflows.argoproj.io/workflow": "k2-abcde"}
RANK = K2 | {"app.kubernetes.io/component": "pretrain", "batch.kubernetes.io/job-name": "k2-run-pretrain-node-0"}
PLATFORM = K2 | {"app.kubernetes.io/component": "platform", "batch.kubernetes.io/job-name": "k2-pipeline-upload"}
SANDBOX = K2 | {"app.kubernetes.io/component": "sandbox"}


def of_kind(path: str, kind: str) -> list[Object]:
    return [each for each in kustomize(path) if each["kind"] == kind]


def overlay(kind: str) -> str:
    return f"manifests/overlays/{kind}"


@pytest.mark.parametrize("path", PATHS)
def test_every_object_is_valid(path: str) -> None:
    for thing in kustomize(path):
        validate(thing)
    names = [name(thing) for thing in kustomize(path)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("StatefulSet", {"spec": {"replica": 1}}),
        ("LimitRange", {"spec": {"limits": "none"}}),
        ("NetworkPolicy", {"spec": {"podSelektor": {}}}),
    ],
)
def test_the_validation_can_fail(kind: str, change: dict[str, Any]) -> None:
    thing = of_kind(overlay("dev"), kind)[0]
    with pytest.raises(Exception, match=r"replica|none|podSelektor"):
        validate(thing | {"spec": thing["spec"] | change["spec"]})
    queue = of_kind("manifests/admin/overlays/standalone", "ClusterQueue")[0]
    with pytest.raises(jsonschema.ValidationError):
        validate(queue | {"spec": queue["spec"] | {"cohort": "v1beta1"}})


@pytest.mark.parametrize(
    "file", sorted((ROOT / "pipelines" / "compiled").glob("*.resources.yaml")), ids=lambda p: p.name
)
def test_compiled_pipelines_are_valid_and_applied_in_order(file: Path) -> None:
    pipeline, version = yaml.safe_load_all(file.read_text())
    for thing in (pipeline, version):
        assert is_custom(thing)
        validate(thing)
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    waves = [int(thing["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"]) for thing in (pipeline, version)]
    assert waves[0] < waves[1]


@pytest.mark.parametrize(("kind", "namespace"), OVERLAYS.items())
def test_an_overlay_stays_in_its_namespace_and_creates_none(kind: str, namespace: str) -> None:
    for thing in kustomize(overlay(kind)):
        assert thing["kind"] not in CLUSTER_SCOPED, name(thing)
        assert thing["metadata"]["namespace"] == namespace, name(thing)
        for subject in thing.get("subjects", []):
            assert subject["namespace"] == namespace, "an account without its namespace is refused by the API server"


@pytest.mark.parametrize("kind", OVERLAYS)
def test_the_deployment_file_runs_the_images_of_its_overlay(kind: str) -> None:
    (each,) = [each for each in of_kind(overlay(kind), "ConfigMap") if each["metadata"]["name"] == "k2-deployment"]
    deployment = Deployment.model_validate(yaml.safe_load(each["data"]["deployment.yaml"]))
    used = {
        c["image"] for thing in kustomize(overlay(kind)) for t in pod_templates(thing) for c in t["spec"]["containers"]
    }
    assert used <= set(deployment.images.values())
    assert deployment.kubeflow.namespace == OVERLAYS[kind]
    labels = {f"k2.dev/{name}": value for name, value in deployment.labels.items()}
    assert labels.items() <= each["metadata"]["labels"].items()


def test_the_admin_part_is_cluster_scoped_and_a_profile_gets_no_namespace() -> None:
    for path in ADMIN:
        assert {each["kind"] for each in kustomize(f"manifests/admin/overlays/{path}")} <= CLUSTER_SCOPED
    assert not of_kind("manifests/admin/overlays/profile", "Namespace")
    (namespace,) = of_kind("manifests/admin/overlays/standalone", "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_dev_and_the_base_need_no_custom_resource() -> None:
    for path in (overlay("dev"), "manifests/base", "manifests/admin/base"):
        assert not [name(each) for each in kustomize(path) if is_custom(each)]


def composed(folder: Path, base: str, *components: str) -> tuple[Object, ...]:
    """A base with components, as an overlay of somebody else's would have them."""
    path = Path(os.path.relpath(ROOT / "manifests", folder))
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(path / base)],
        "components": [str(path / each) for each in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return kustomize(str(folder))


@pytest.mark.parametrize("component", sorted(p.name for p in (ROOT / "manifests" / "components").iterdir()))
def test_each_component_works_alone(component: str, tmp_path: Path) -> None:
    """So any of them can be left out: none refers to another."""
    objects = composed(tmp_path, "base", f"components/{component}")
    assert {name(each) for each in objects} > {name(each) for each in kustomize("manifests/base")}
    for thing in objects:
        validate(thing)


@pytest.mark.parametrize("component", ["namespace", "rdma", "kueue", "trainer"])
def test_each_component_of_the_admin_part_works_alone(component: str, tmp_path: Path) -> None:
    for thing in composed(tmp_path, "admin/base", f"admin/components/{component}"):
        validate(thing)
        assert thing["kind"] in CLUSTER_SCOPED


def test_an_older_kubeflow_gets_baseline(tmp_path: Path) -> None:
    objects = composed(tmp_path, "admin/base", "admin/components/namespace", "admin/components/baseline")
    (namespace,) = [each for each in objects if each["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"


@pytest.mark.parametrize("kind", OVERLAYS)
def test_every_object_says_what_it_is_and_who_pays(kind: str) -> None:
    wanted = {"app.kubernetes.io/name", "app.kubernetes.io/part-of", "k2.dev/team", "k2.dev/project"}
    for thing in kustomize(overlay(kind)):
        assert set(thing["metadata"]["labels"]) >= wanted | {"k2.dev/cost-center"}, name(thing)


@pytest.mark.parametrize("path", PATHS)
def test_every_pod_is_restricted(path: str) -> None:
    templates = [template for thing in kustomize(path) for template in pod_templates(thing)]
    assert templates
    for template in templates:
        assert_restricted(template)
        assert template["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("kind", OVERLAYS)
def test_network_policies_deny_what_they_do_not_name(kind: str) -> None:
    policies = of_kind(overlay(kind), "NetworkPolicy")
    assert allowed(policies, SANDBOX, "egress") == allowed(policies, SANDBOX, "ingress") == []
    assert 6443 in ports(policies, STEP)
    assert {8888, 53} <= ports(policies, STEP) & ports(policies, PLATFORM)
    assert not {6443, 8888} & ports(policies, RANK)
    assert 53 in ports(policies, RANK)
    peers = [to for rule in allowed(policies, RANK, "egress") if "ports" not in rule for to in rule["to"]]
    assert len(peers) == 1
    assert selects(peers[0]["podSelector"], RANK)
    for other in (SANDBOX, STEP, PLATFORM):
        assert not selects(peers[0]["podSelector"], other)
        assert not [rule for rule in allowed(policies, other, "egress") if "ports" not in rule]


def ports(policies: list[Object], labels: dict[str, str]) -> set[int]:
    """What a pod may connect to."""
    return {port["port"] for rule in allowed(policies, labels, "egress") for port in rule.get("ports", [])}


def test_pods_of_steps_have_the_labels_that_policies_look_for() -> None:
    """Argo and the Job controller add theirs; the rest is what `k2 pipeline compile` and the runtimes write."""
    deployment = Deployment.model_validate(yaml.safe_load((ROOT / "pipelines/deployments/cpu.yaml").read_text()))
    written = pods.labels(deployment.placement("pretrain"))
    assert K2.items() <= written.items()
    assert selects(policy("k2-step")["podSelector"], written | {"workflows.argoproj.io/workflow": "w"})
    assert selects(policy("k2-rank")["podSelector"], written | {"batch.kubernetes.io/job-name": "j"})
    for thing in kustomize(overlay("prod")):
        for template in pod_templates(thing):
            marked = template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": "j"}
            assert selects(policy("k2-rank")["podSelector"], marked) == (thing["kind"] == "TrainingRuntime")


def policy(wanted: str) -> Object:
    found: Object = next(
        each["spec"] for each in of_kind("manifests/base", "NetworkPolicy") if name(each).endswith(wanted)
    )
    return found


@pytest.mark.parametrize("kind", OVERLAYS)
def test_nobody_reaches_cloud_metadata(kind: str) -> None:
    """169.254.169.254 hands out a node's credentials."""
    for policy in of_kind(overlay(kind), "NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for block in [to["ipBlock"] for to in rule.get("to", []) if "ipBlock" in to]:
                assert block["cidr"] != "0.0.0.0/0" or "169.254.0.0/16" in block["except"]


def test_in_dev_runs_reach_the_store_inside_and_only_its_s3_port() -> None:
    policies = of_kind(overlay("dev"), "NetworkPolicy")
    store = K2 | {"app.kubernetes.io/component": "store"}
    (rule,) = allowed(policies, store, "ingress")
    assert [port["port"] for port in rule["ports"]] == [8333]
    assert allowed(policies, store, "egress") == []
    assert not selects(rule["from"][0]["podSelector"], SANDBOX)
    for pod in (STEP, RANK, PLATFORM):
        assert selects(rule["from"][0]["podSelector"], pod)
        reached = [to for each in allowed(policies, pod, "egress") for to in each["to"] if "podSelector" in to]
        assert any(selects(to["podSelector"], store) for to in reached)


@pytest.mark.parametrize("path", PATHS)
def test_roles_grant_no_more_than_is_used(path: str) -> None:
    for role in [each for each in kustomize(path) if each["kind"] in ("Role", "ClusterRole")]:
        for rule in role["rules"]:
            assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            assert not {"secrets", "pods/exec", "roles", "rolebindings"} & set(rule["resources"])


@pytest.mark.parametrize(("kind", "account"), [("dev", "pipeline-runner"), ("profile", "default-editor")])
def test_the_launcher_role_is_bound_to_kubeflows_account(kind: str, account: str) -> None:
    bindings = {each["metadata"]["name"]: each for each in of_kind(overlay(kind), "RoleBinding")}
    assert [subject["name"] for subject in bindings["k2-launcher"]["subjects"]] == [account]


def test_a_quota_has_defaults_for_all_it_counts() -> None:
    """Kubeflow's own containers state no resources: a quota without defaults would refuse every pipeline pod."""
    (quota,) = of_kind(overlay("prod"), "ResourceQuota")
    (limits,) = of_kind(overlay("prod"), "LimitRange")
    (container,) = limits["spec"]["limits"]
    counted = {each.removeprefix("requests.") for each in quota["spec"]["hard"] if each.startswith("requests.")}
    assert {each for each in counted if "/" not in each} <= set(container["defaultRequest"])
    assert not [each for each in quota["spec"]["hard"] if each.startswith("limits.")]
    assert "default" not in container, "a default limit would hit Kubeflow's own servers"


def test_queues_cover_what_deployments_and_runtimes_ask_for() -> None:
    admin = kustomize("manifests/admin/overlays/standalone")
    queues = {each["metadata"]["name"]: quotas(each) for each in admin if each["kind"] == "ClusterQueue"}
    local = {each["metadata"]["name"]: each["spec"] for each in of_kind(overlay("prod"), "LocalQueue")}
    flavors = {each["metadata"]["name"] for each in admin if each["kind"] == "ResourceFlavor"}
    assert {flavor for each in admin if each["kind"] == "ClusterQueue" for flavor in used_flavors(each)} <= flavors
    for runtime in of_kind(overlay("prod"), "TrainingRuntime"):
        for template in pod_templates(runtime):
            requests = template["spec"]["containers"][0]["resources"]["requests"]
            assert all(set(requests) <= set(quota) for quota in queues.values())
    overlays = (ROOT / "manifests" / "overlays").glob("*/deployment.yaml")
    for path in sorted([*(ROOT / "pipelines" / "deployments").glob("*.yaml"), *overlays]):
        deployment = Deployment.model_validate(yaml.safe_load(path.read_text()))
        for queue, wanted in deployment.queues.items():
            given = queues[local[queue]["clusterQueue"]]
            assert all(amount(quantity) <= given[resource] for resource, quantity in wanted.quota.items())


def quotas(queue: Object) -> dict[str, float]:
    groups = queue["spec"]["resourceGroups"]
    rows = [resource for group in groups for flavor in group["flavors"] for resource in flavor["resources"]]
    return {row["name"]: amount(row["nominalQuota"]) for row in rows}


def used_flavors(queue: Object) -> set[str]:
    return {flavor["name"] for group in queue["spec"]["resourceGroups"] for flavor in group["flavors"]}


def test_shared_memory_fits_into_the_memory_limit() -> None:
    for runtime in of_kind(overlay("prod"), "TrainingRuntime"):
        (template,) = pod_templates(runtime)
        limit = amount(template["spec"]["containers"][0]["resources"]["limits"]["memory"])
        (shm,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "shm"]
        assert 0 < amount(shm["emptyDir"]["sizeLimit"]) <= limit / 2


def test_the_store_starts_as_its_manifest_says(tmp_path: Path) -> None:
    """The manifest's command, arguments and environment, on other ports, from a folder that cannot be written."""
    (stateful,) = of_kind(overlay("dev"), "StatefulSet")
    container = stateful["spec"]["template"]["spec"]["containers"][0]
    ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
    s3 = ports.pop("s3.port")
    arguments = [
        *(each.replace("8333", str(s3)).replace("/data", str(tmp_path / "data")) for each in container["args"]),
        *(f"-{flag}={port}" for flag, port in ports.items()),
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "empty").mkdir(mode=0o555)
    variables = {each["name"]: each.get("value", f"key-{each['name']}") for each in container["env"]}
    weed = Path(sys.executable).with_name(container["command"][0])
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [weed, *arguments], cwd=tmp_path / "empty", env=variables | {"HOME": "/nonexistent"}, stdout=log, stderr=log
        )
    keys = [variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]]
    try:
        assert buckets(s3, *keys) == ["k2-data"], (tmp_path / "log").read_text()[-2000:]
        with pytest.raises(MinioException):
            client(s3, keys[0], "wrong").list_buckets()
    finally:
        process.kill()
        process.wait()


def client(port: int, access: str, secret: str) -> Minio:
    pool = PoolManager(retries=False, timeout=5.0)
    return Minio(f"127.0.0.1:{port}", access, secret, secure=False, region="us-east-1", http_client=pool)


def buckets(port: int, access: str, secret: str) -> list[str]:
    for _ in range(150):
        try:
            found = [bucket.name for bucket in client(port, access, secret).list_buckets()]
            if found:
                return found
        except (MinioException, HTTPError):
            pass
        time.sleep(0.2)
    return []
