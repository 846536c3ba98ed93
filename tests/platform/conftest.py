"""The shipped deployments."""

from pathlib import Path

import pytest

from k2.config.deployment import Deployment
from k2.platform.documents import read_section

DEPLOYMENTS = Path(__file__).parents[2] / "pipelines" / "deployments"


@pytest.fixture(scope="session")
def gpu() -> Deployment:
    """The shipped deployment of a GPU cluster, which `pipelines/compiled` is rendered for."""
    return read_section(DEPLOYMENTS / "gpu.yaml", Deployment)


@pytest.fixture(scope="session")
def cpu() -> Deployment:
    """The shipped deployment of a cluster without accelerators."""
    return read_section(DEPLOYMENTS / "cpu.yaml", Deployment)
