"""Fixtures that every test may use: a real S3 server, an empty tenant in it, and a harness for stages."""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from k2.config.base import Section
from k2.execution.contract import StageResult
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import Store
from k2.store.embedded import Server, embedded_server
from k2.store.lease import Lease
from k2.store.work import WorkArea

# A machine that is busy for a moment makes no property false.
settings.register_profile("k2", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("k2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class SilentProgress:
    """Keeps what a stage reports, for assertions."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        self.updates.append({"done": done, "total": total, "unit": unit, **values})

    def event(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, **values})


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An embedded SeaweedFS for the session."""
    with embedded_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def store(s3_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """An empty tenant; the environment points at it, also for subprocesses."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("K2_S3_PREFIX", f"t-{uuid.uuid4().hex[:8]}")
    monkeypatch.setenv("K2_HOME", str(tmp_path / "home"))
    return Store.from_environment()


@pytest.fixture
def progress() -> SilentProgress:
    """A progress that keeps what it is told."""
    return SilentProgress()


@pytest.fixture
def stage_harness(store: Store, progress: SilentProgress) -> Callable[..., StageResult]:
    """`stage_harness(run, config, inputs)` runs a stage function on the real store, as the runner would."""

    def harness(run: Callable[..., StageResult], config: Section, inputs: Mapping[str, Artifact]) -> StageResult:
        key = uuid.uuid4().hex
        kind = run.__module__.rpartition(".")[2]
        with Lease(store, f"work/{key}/lease.json") as lease:
            writer = ArtifactWriter(store, kind, key, WorkArea(store, key, lease))
            try:
                return run(config, inputs, writer, progress=progress)
            finally:
                writer.discard()

    return harness


@pytest.fixture
def make_artifact(store: Store) -> Callable[..., Artifact]:
    """`make_artifact(kind, {name: bytes or Path})` publishes an input for a stage under test."""

    def make(kind: str, contents: Mapping[str, bytes | Path], **statistics: Any) -> Artifact:
        key = uuid.uuid4().hex
        with Lease(store, f"work/{key}/lease.json") as lease:
            writer = ArtifactWriter(store, kind, key, WorkArea(store, key, lease))
            try:
                for name, data in contents.items():
                    writer.path(name).write_bytes(data.read_bytes() if isinstance(data, Path) else data)
                return writer.publish(**statistics)
            finally:
                writer.discard()

    return make
