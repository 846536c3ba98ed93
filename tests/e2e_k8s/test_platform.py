"""What the manifests ask of a cluster, on a real one; and what their roles refuse."""

import json
from pathlib import Path
from urllib.error import HTTPError

import pytest
from kubernetes import config

from k2.config.deployment import Deployment
from k2.errors import UserError
from k2.launch.cluster import Cluster
from k2.launch.preflight import require
from k2.platform.needs import of_deployment
from k2.store.client import Store
from tests.e2e.conftest import Site
from tests.e2e_k8s.conftest import RUNNER, SPACE, Platform
from tests.e2e_k8s.pods import cluster_of

pytestmark = pytest.mark.e2e
LAUNCHER = [
    *("create batch/jobs", "delete batch/jobs", "create services", "list pods", "get pods/log"),
    *("create trainer.kubeflow.org/trainjobs", "get argoproj.io/workflows"),
]
ALLOWED = {
    RUNNER: [*LAUNCHER, "create pods"],
    "k2-platform": ["create pipelines.kubeflow.org/pipelines", "terminate pipelines.kubeflow.org/runs"],
    "k2-rank": [],
    "k2-sandbox": [],
}
"""What accounts may do in the overlay `dev`, whose component `sandbox` is what lets steps create pods."""

DENIED = [
    *(
        "get secrets",
        "list secrets",
        "get configmaps",
        "create pods/exec",
        "create pods/attach",
        "delete services/proxy",
    ),
    *("create serviceaccounts/token", "create rbac.authorization.k8s.io/roles", "bind rbac.authorization.k8s.io/roles"),
    *("create apps/deployments", "delete persistentvolumeclaims", "delete networking.k8s.io/networkpolicies"),
]


def test_the_cluster_took_every_object(platform: Platform) -> None:
    for each in platform.objects:
        kind = f"{each['kind']}.{each['apiVersion'].rpartition('/')[0]}".rstrip(".")
        made = json.loads(platform.kubernetes.kubectl("get", kind, each["metadata"]["name"], f"-n={SPACE}", "-o=json"))
        assert made["metadata"]["labels"].items() >= each["metadata"]["labels"].items()


def test_the_store_inside_keeps_objects_and_knows_its_callers(platform: Platform, store: Store) -> None:
    store.put("probe", b"text")
    assert store.get("probe") == b"text"
    path = f"/api/v1/namespaces/{SPACE}/pods?labelSelector=app.kubernetes.io/component%3Dstore"
    (pod,) = platform.kubernetes.read(path)["items"]
    (status,) = pod["status"]["containerStatuses"]
    assert status["imageID"] == platform.store_image
    assert status["restartCount"] == 0


def can(platform: Platform, token: str, action: str, namespace: str) -> bool:
    """Whether the API server lets the bearer of a token do something; `verb group/resource/subresource`."""
    verb, _, what = action.partition(" ")
    group, _, resource = what.partition("/") if "." in what or what.startswith(("batch/", "apps/")) else ("", "", what)
    resource, _, sub = resource.partition("/")
    wanted = {"verb": verb, "group": group, "resource": resource, "subresource": sub, "namespace": namespace}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": wanted},
    }
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    return bool(platform.kubernetes.ask(path, token, review)["status"]["allowed"])


@pytest.mark.parametrize("account", ALLOWED)
def test_roles_allow_what_is_needed_and_no_more(platform: Platform, account: str) -> None:
    token = platform.token(account)
    assert [each for each in ALLOWED[account] if not can(platform, token, each, SPACE)] == []
    others = {each for known in ALLOWED.values() for each in known} - set(ALLOWED[account])
    assert [each for each in (*DENIED, *sorted(others)) if can(platform, token, each, SPACE)] == []
    assert [each for each in (*DENIED, *LAUNCHER) if can(platform, token, each, "default")] == []


def test_a_refusal_is_more_than_an_answer(platform: Platform) -> None:
    """A step's token does not read the store's Secret."""
    path = f"/api/v1/namespaces/{SPACE}/secrets/k2-s3"
    assert platform.kubernetes.read(path)["data"]
    with pytest.raises(HTTPError, match="403"):
        platform.kubernetes.ask(path, platform.token(RUNNER))


def test_what_is_missing_is_refused_before_anything_is_made(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    """By a person who may see everything, by a step, and by an account without rights."""
    pools = {"light": {}, "gpu": {"launch": "trainjob"}, "job": {"launch": "job"}}
    named = {"images": {"cpu": platform.image}, "store": {"secret": "k2-s3"}, "pull_secrets": ["registry"]}
    placed = {"pools": pools, "default_pool": "light", "stages": {"pretrain": "gpu", "sft": "job"}}
    needs = of_deployment(Deployment.model_validate(named | placed))
    person = Cluster(config.new_client_from_config(str(platform.kubernetes.kubeconfig)), SPACE)
    with pytest.raises(UserError) as refusal:
        require(person, needs)
    missing = "pools.gpu.launch: nothing serves trainer.kubeflow.org/v1alpha1; install Kubeflow Trainer 2, or"
    assert str(refusal.value).startswith(missing)
    assert "Secret registry: there is none in kubeflow, and pull_secrets names it" in str(refusal.value)
    assert "Secret k2-s3" not in str(refusal.value)
    with pytest.raises(UserError) as refusal:
        require(cluster_of(platform, RUNNER), needs)
    assert str(refusal.value) == f"{missing} set launch: job"
    assert "Secret k2-s3: these credentials may not look for it (store.secret)" in caplog.text
    with pytest.raises(UserError, match=r"may jobs.batch in kubeflow: missing: create, delete, get, list; the Role"):
        require(cluster_of(platform, "k2-rank"), needs)


def test_doctor_finds_the_account_complete(platform: Platform, tmp_path: Path) -> None:
    check = ("doctor", "--cluster", "--namespace", SPACE, "--account", RUNNER)
    found = Site(tmp_path).k2(*check, KUBECONFIG=str(platform.kubernetes.kubeconfig))
    assert found.code == 0, found.out + found.err
