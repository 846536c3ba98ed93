"""A cluster to launch on, and a placement there."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.config.deployment import Deployment, Placement
from k2.launch.cluster import Cluster
from k2.platform.pods import CREDENTIALS, STORE_KEYS
from tests.launch.fake_kubernetes import FakeKubernetes, kubeconfig

DIGEST = "sha256:" + "1" * 64
DEPLOYMENT = {
    "images": {"cpu": f"registry.example/k2/cpu@{DIGEST}"},
    "store": {"secret": "k2-s3"},
    "labels": {"team": "ml"},
    "queues": {"k2-gpu": {"quota": {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 16}}},
    "default_pool": "light",
    "pools": {
        "light": {"cpu": "500m", "memory": "1Gi"},
        "job": {"launch": "job", "cpu": 1, "memory": "2Gi", "shm": "64Mi"},
        "pair": {"launch": "job", "cpu": 1, "memory": "2Gi", "nodes": 2},
        "gpus": {
            "launch": "trainjob",
            "cpu": "1500m",
            "memory": "16Gi",
            "nodes": 2,
            "accelerator": {"resource": "nvidia.com/gpu", "count": 8},
            "queue": "k2-gpu",
            "topology": {"required": "topology.kubernetes.io/rack"},
        },
    },
    "stages": {"tokenize": "job", "pretrain": "pair"},
    "timeouts": {"task_hours": 1, "queue_hours": 1},
}


def placement(stage: str, pool: str | None = None, **timeouts: int) -> Placement:
    """Where a stage runs in a deployment of several kinds of pools."""
    stages = DEPLOYMENT["stages"] | ({stage: pool} if pool else {})
    deployment = Deployment.model_validate(DEPLOYMENT | {"stages": stages})
    return deployment.placement(stage).model_copy(update=timeouts)


CORE = "/api/v1/namespaces/ml"


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """A server with the store's Secret; clients find it by KUBECONFIG."""
    server = FakeKubernetes()
    keys = dict.fromkeys((*STORE_KEYS, *CREDENTIALS), "eA==")
    server.add(f"{CORE}/secrets", {"metadata": {"name": "k2-s3"}, "data": keys})
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(server, tmp_path, "ml")))
    # The client reads the variable when it is imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig.json"))
    yield server
    for process in server.kubelet.processes if server.kubelet else ():
        process.kill()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cluster(kubernetes: FakeKubernetes) -> Cluster:
    """The namespace `ml`."""
    return Cluster.connect("ml")
