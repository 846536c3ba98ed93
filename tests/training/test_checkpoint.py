"""Killed at any moment and started again, a run ends in the same bytes."""

import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2.errors import StageError
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea
from k2.training.state import TrainState
from tests.training.small import CONFIG, FolderWork, NoProgress, digest, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    return run(FolderWork(tmp_path_factory.mktemp("straight")))


class Killed(Exception):
    """Stands for the end of a process."""


class DyingProgress(NoProgress):
    def __init__(self, step: int) -> None:
        self.left = step

    def update(self, done: float, total: float, unit: str, **values: object) -> None:
        if done == self.left:
            raise Killed


@pytest.mark.parametrize("step", [1, 9, 16, 17])
def test_resume_from_any_step_is_exact(step: int, finished: TrainState, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(FolderWork(tmp_path), progress=DyingProgress(step))
    assert digest(run(FolderWork(tmp_path))) == digest(finished)


def test_the_interval_does_not_change_the_bytes(finished: TrainState, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"checkpoint_interval": 7})
    assert digest(run(FolderWork(tmp_path), config)) == digest(finished)
    assert FolderWork(tmp_path).names() == [
        f"checkpoint-{step:09d}.{kind}" for step in (7, 14) for kind in ("json", "safetensors")
    ]


def test_qk_clip_and_both_contexts_took_part(finished: TrainState) -> None:
    assert finished.optimizer.qk_clip.counts.sum() > 0
    assert finished.model.config.rope_scaling == CONFIG.yarn
    assert finished.model.config.max_position_embeddings == 32
    assert [note["name"] for note in finished.notes["heldout"]] == [
        "short_context_before",
        "short_context_after",
        "long_context_before",
        "long_context_after",
    ]
    losses = [note["loss"] for note in finished.notes["heldout"]]
    assert losses[1] < losses[0] - 0.2


def program(folder: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}
    command = [sys.executable, str(Path(__file__).with_name("small.py")), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def commits(folder: Path) -> str:
    index = folder / "index.json"
    return index.read_text() if index.exists() else ""


def test_kill_9_from_outside_at_random_instants_then_finish(finished: TrainState, tmp_path: Path) -> None:
    for _ in range(2):
        before = commits(tmp_path)
        with program(tmp_path) as process:
            while process.poll() is None and commits(tmp_path) == before:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.05))  # anywhere in a step or in the next save
            process.kill()
        assert process.returncode == -9
    with program(tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.read().strip() == digest(finished)


def test_a_corrupt_newest_checkpoint_costs_only_steps(
    finished: TrainState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Corrupt(FolderWork):
        def load(self, name: str) -> bytes | None:
            if name == "checkpoint-000000020.safetensors":
                raise StageError(f"{name} is corrupt")
            return super().load(name)

    run(FolderWork(tmp_path))
    with caplog.at_level(logging.WARNING):
        again = run(Corrupt(tmp_path))
    assert "000000020.safetensors is corrupt" in caplog.text
    assert digest(again) == digest(finished)


def test_the_real_work_area_resumes_too(finished: TrainState, store: Store) -> None:
    with Lease(store, "work/one/lease.json") as lease, pytest.raises(Killed):
        run(WorkArea(store, "one", lease), progress=DyingProgress(13))
    with Lease(store, "work/one/lease.json") as lease:
        work = WorkArea(store, "one", lease)
        assert work.names() == [
            f"checkpoint-{step:09d}.{kind}" for step in (10, 12) for kind in ("json", "safetensors")
        ]
        assert digest(run(work)) == digest(finished)
