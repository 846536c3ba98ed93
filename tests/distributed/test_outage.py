"""A store that is away for minutes: a real server is killed, and started again on its data, while a model trains.

All of it a hundred times faster: who has 900 s of patience by default has 9 s here, and pauses are shares of that.
"""

import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.distributed.checkpoint import PATIENCE_S, Checkpoints
from k2.distributed.retention import listed, name_of
from k2.errors import StageError
from k2.processes import end_with_parent
from k2.store.client import Store, StoreSettings
from k2.store.embedded import PORT_FLAGS, Server, _command, _credentials, _wait_ready, free_ports
from k2.store.lease import Lease
from k2.store.work import WorkArea
from tests.distributed.test_checkpoint import fresh, steps
from tests.training.small import digest

FASTER = 100
MINUTES = 3


class Service:
    """A server that can be killed and started again, on the same port and data."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
        self.server = Server(f"http://127.0.0.1:{ports['s3.port']}", *_credentials(folder), 0)
        self._command = _command(folder, ports)
        self.start()

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet, preexec_fn=end_with_parent)
        _wait_ready(self._process, self.server)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    found = Service(tmp_path / "server")
    yield found
    found.kill()


@pytest.fixture
def store(service: Service, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in service.server.environment().items():
        monkeypatch.setenv(name, value)
    return Store(StoreSettings(service.server.endpoint, retries=0))


def test_minutes_without_the_store_cost_nothing_and_more_than_its_patience_one_checkpoint(
    service: Service, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    straight, source = fresh()
    steps(straight, source, 4)
    state, source = fresh()
    caplog.set_level(logging.WARNING)
    with Lease(store, "work/stage/lease.json") as lease:
        work = WorkArea(store, "stage", lease)
        with Checkpoints(work, 1, patience_s=PATIENCE_S / FASTER) as checkpoints:
            steps(state, source, 1, checkpoints)
            checkpoints.wait()
            service.kill()
            back = time.monotonic() + 60 * MINUTES / FASTER
            steps(state, source, 4, checkpoints)
            assert time.monotonic() < back, "training waited"
            assert listed(work) == [name_of(1)]
            time.sleep(max(0.0, back - time.monotonic()))
            service.start()
            checkpoints.wait()
        assert "checkpoints: waiting up to 9 s for the store: cannot write s3://" in caplog.text
        assert "checkpoints: the store is back" in caplog.text
        assert "was not saved" not in caplog.text
        assert listed(work) == [name_of(1), name_of(2)]
        assert digest(state) == digest(straight)

        resumed, again = fresh(1)
        assert Checkpoints(work, 1, patience_s=PATIENCE_S / FASTER).restore(resumed, again)
        assert resumed.step == 2
        steps(resumed, again, 4)
        assert digest(resumed) == digest(straight)

        impatient = Checkpoints(work, 1, patience_s=0.3)
        service.kill()
        with pytest.raises(StageError) as error:
            impatient.save(state, source)
        said = str(error.value)
        assert said.startswith(f"the checkpoint was not saved: tried for 0 s: cannot write {store.url('work/stage')}")
        assert f" at {service.server.endpoint}: unreachable" in said
        assert said.endswith(f"; {store.url('work/stage')} keeps {name_of(2)}")
        with pytest.raises(StageError, match="cannot read"):
            impatient.restore(*fresh())
