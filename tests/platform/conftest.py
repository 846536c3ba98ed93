"""The shipped deployments, and the stand-in of Kubeflow's API server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.config.deployment import Deployment, Kubeflow
from k2.platform.api import PipelinesApi
from k2.platform.documents import read_section
from k2.platform.render import Rendering, render
from tests.platform import fake_kubeflow as fake

DEPLOYMENTS = Path(__file__).parents[2] / "pipelines" / "deployments"


@pytest.fixture(scope="session")
def gpu() -> Deployment:
    """The shipped deployment of a GPU cluster, which `pipelines/compiled` is rendered for."""
    return read_section(DEPLOYMENTS / "gpu.yaml", Deployment)


@pytest.fixture(scope="session")
def cpu() -> Deployment:
    """The shipped deployment of a cluster without accelerators."""
    return read_section(DEPLOYMENTS / "cpu.yaml", Deployment)


@pytest.fixture(scope="session")
def rendering(cpu: Deployment) -> Rendering:
    """The recipe for the cluster without accelerators."""
    return render("k2", cpu)


@pytest.fixture(scope="session")
def guarded(gpu: Deployment) -> Rendering:
    """The guarded recipe for the GPU cluster."""
    return render("k2-retrain", gpu)


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.Kubeflow]:
    """The stand-in, empty; nothing else in the environment leads anywhere."""
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", "/nonexistent/token")
    with fake.serve(fake.Kubeflow()) as state:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", state.url)
        yield state


@pytest.fixture
def api(kubeflow: fake.Kubeflow) -> PipelinesApi:
    return PipelinesApi(Kubeflow())
