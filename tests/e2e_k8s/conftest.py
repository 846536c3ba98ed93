"""A cluster with the project's image in its registry and the overlay `dev` applied to it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from k2.store.client import Store
from tests.e2e_containers.conftest import STORE_KEYS, selected
from tests.e2e_containers.daemons import push, registry, run, wait
from tests.e2e_k8s.cluster import REGISTRY, Kubernetes, Object, cluster, network
from tests.manifests.render import kustomize

SPACE = "kubeflow"
"""The namespace of the overlay."""

RUNNER = "pipeline-runner"
"""Kubeflow's own account, which pipeline steps run as."""

PAUSE = 'FROM {image}\nENTRYPOINT ["sleep", "infinity"]\n'
"""A pod's network lives as long as a process of this image; sharing its layers, it costs nothing."""

WITHOUT_KUBEFLOW = {("Job", "k2-pipeline-upload")}
"""What ends in an error where Kubeflow Pipelines is not."""


@dataclass(frozen=True)
class Platform:
    """A cluster on which K2 is installed, its images by digest, and what was applied."""

    kubernetes: Kubernetes
    image: str
    store_image: str
    objects: tuple[Object, ...]

    def token(self, account: str) -> str:
        """The token of a service account."""
        kubernetes = self.kubernetes
        secrets = kubernetes.kubectl("get", "sa", account, f"-n={SPACE}", "-o=jsonpath={.secrets[0].name}")
        return kubernetes.kubectl(
            "get", "secret", secrets, f"-n={SPACE}", "-o=go-template={{.data.token|base64decode}}"
        )

    def store(self) -> dict[str, str]:
        """The environment that points at the store inside, from here."""
        address = self.kubernetes.kubectl("get", "svc", "k2-store", f"-n={SPACE}", "-o=jsonpath={.spec.clusterIP}")
        return store_secret(f"http://{address}:8333")


def store_secret(endpoint: str) -> dict[str, str]:
    """What the one Secret holds."""
    return STORE_KEYS | {"K2_S3_ENDPOINT": endpoint, "K2_S3_BUCKET": "k2-data", "K2_S3_PREFIX": "default"}


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The platform as docs/platform.md sets it up, without Kubeflow."""
    selected("k8s")
    folder = tmp_path_factory.mktemp("k8s")
    image = os.environ["K2_IMAGE"]
    with network(), registry(folder / "registry", REGISTRY) as address:
        pinned = push(image, "cpu", address, folder)
        store_image = push(os.environ["K2_STORE_IMAGE"], "store", address, folder)
        pause = push(_pause(image, folder), "pause", address, folder)
        with cluster(folder / "cluster", pause) as kubernetes:
            made = Platform(kubernetes, pinned, store_image, _objects(pinned, store_image))
            kubernetes.apply(*_given(folder), *made.objects)
            kubernetes.kubectl("rollout", "status", "statefulset/k2-store", f"-n={SPACE}", "--timeout=120s")
            yield made


@pytest.fixture
def store(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store inside."""
    for name, value in platform.store().items():
        monkeypatch.setenv(name, value)
    found = Store.from_environment()
    wait(lambda: found.list("") is not None, 30, lambda: "the store")
    return found


def _pause(image: str, folder: Path) -> str:
    name = "localhost/k2/pause:e2e"
    (folder / "Dockerfile").write_text(PAUSE.format(image=image))
    run("buildah", "bud", "--quiet", "--isolation=chroot", "--format=docker", "--tag", name, str(folder))
    return name


def _objects(image: str, store_image: str) -> tuple[Object, ...]:
    """The overlay `dev` with our images; its objects are of Kubernetes alone."""
    text = yaml.safe_dump_all(kustomize("manifests/overlays/dev"))
    for name, digit, ours in (("cpu", "1", image), ("store", "3", store_image)):
        reserved = f"registry.example/k2/{name}@sha256:{digit * 64}"
        assert reserved in text
        text = text.replace(reserved, ours)
    found = yaml.safe_load_all(text)
    return tuple(each for each in found if (each["kind"], each["metadata"]["name"]) not in WITHOUT_KUBEFLOW)


def _given(folder: Path) -> list[Object]:
    """What a platform team brings: the namespace, Kubeflow's account, the one Secret, a disk."""
    data = folder / "disk"
    data.mkdir()
    # A group for a volume's files (fsGroup) is not for folders of the node.
    os.chown(data, 1000, 1000)
    disk = {
        "capacity": {"storage": "20Gi"},
        "accessModes": ["ReadWriteOnce"],
        "hostPath": {"path": str(data), "type": "Directory"},
    }
    secret = store_secret(f"http://k2-store.{SPACE}.svc:8333")
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": RUNNER, "namespace": SPACE}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "k2-s3", "namespace": SPACE}, "stringData": secret},
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "k2-store"}, "spec": disk},
    ]
