"""An image, a registry that has it, a Docker daemon, and an object store in a container."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e_containers.daemons import answers, dockerd, push, registry, run, wait

ADDRESS = "127.0.0.1:5056"
NETWORK = "k2-e2e"
STORE_KEYS = {"K2_S3_ACCESS_KEY": "e2e", "K2_S3_SECRET_KEY": "only-for-this-test"}


def selected(kind: str) -> None:
    """Skip unless `K2_E2E` names this kind of tests; then the images have to be there too."""
    if os.environ.get("K2_E2E") != kind or not {"K2_IMAGE", "K2_STORE_IMAGE"} <= set(os.environ):
        target = {"containers": "e2e", "k8s": "e2e-k8s"}[kind]
        pytest.skip(
            f"needs root, Debian's container tools and a built image: `make {target}` brings them and runs this"
        )


@dataclass(frozen=True)
class Docker:
    """A daemon with the image, and a network without a way out, on which an object store is."""

    address: str
    image: str
    folder: Path
    store: dict[str, str]

    def docker(self, *arguments: str) -> str:
        """What the client prints."""
        return run("docker", "-H", self.address, *arguments)

    def python(self, code: str, *arguments: str, store: dict[str, str] | None = None) -> str:
        """What a program prints in a container like a step's; `store` changes where its store is."""
        options = [
            "--rm",
            "--read-only",
            "--tmpfs=/tmp:exec",
            "--user=12345:0",
            "--cap-drop=ALL",
            f"--network={NETWORK}",
        ]
        options += [f"--env={name}={value}" for name, value in (self.store | (store or {})).items()]
        return self.docker("run", *options, "--entrypoint=python", self.image, "-c", code, *arguments)


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Docker with everything a pipeline needs."""
    selected("containers")
    folder = tmp_path_factory.mktemp("docker")
    folder.chmod(0o755)
    with registry(folder / "registry", ADDRESS) as address, dockerd(folder / "engine") as engine:
        image = push(os.environ["K2_IMAGE"], "cpu", address, folder)
        store = push(os.environ["K2_STORE_IMAGE"], "store", address, folder)
        for each in (image, store):
            run("docker", "-H", engine, "pull", "--quiet", each)
        run("docker", "-H", engine, "network", "create", "--internal", NETWORK)
        try:
            yield Docker(engine, image, folder, _store(engine, store, folder))
        finally:
            run("docker", "-H", engine, "rm", "--force", "k2-store")
            run("docker", "-H", engine, "network", "rm", NETWORK)


def _store(engine: str, image: str, folder: Path) -> dict[str, str]:
    """SeaweedFS in a container as the manifests start it; the environment that points at it."""
    data = folder / "data"
    data.mkdir()
    os.chown(data, 1000, 1000)
    options = ["--detach", "--name=k2-store", f"--network={NETWORK}", "--user=1000:1000", "--read-only"]
    options += ["--cap-drop=ALL", "--tmpfs=/tmp", f"--volume={data}:/data"]
    options += [f"--env=AWS_ACCESS_KEY_ID={STORE_KEYS['K2_S3_ACCESS_KEY']}"]
    options += [f"--env=AWS_SECRET_ACCESS_KEY={STORE_KEYS['K2_S3_SECRET_KEY']}"]
    weed = ["-logtostderr=true", "mini", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-dir=/data", "-s3.port=8333"]
    weed += ["-bucket=k2-data", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"]
    run("docker", "-H", engine, "run", *options, image, *weed)
    where = ("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "k2-store")
    endpoint = f"http://{run('docker', '-H', engine, *where).strip()}:8333"
    wait(
        lambda: answers("curl", "-fs", f"{endpoint}/status"),
        60,
        lambda: run("docker", "-H", engine, "logs", "k2-store"),
    )
    return STORE_KEYS | {"K2_S3_ENDPOINT": endpoint, "K2_S3_BUCKET": "k2-data", "K2_S3_PREFIX": "default"}
