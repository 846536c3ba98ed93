"""Killed at any moment and started again, a run ends in the same bytes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2.distributed.retention import listed
from k2.store.client import Store
from k2.store.embedded import Server
from k2.training.state import TrainState
from tests.training.small import CONFIG, NoProgress, digest, run, work_area


@pytest.fixture(scope="module")
def finished(s3_server: Server) -> TrainState:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (s3_server.environment() | {"K2_S3_PREFIX": "finished"}).items():
            patch.setenv(name, value)
        return run(Store.from_environment(), "run")


class Killed(Exception):
    """Stands for the end of a process."""


class DyingProgress(NoProgress):
    def __init__(self, step: int) -> None:
        self.left = step

    def update(self, done: float, total: float, unit: str, **values: object) -> None:
        if done == self.left:
            raise Killed


@pytest.mark.parametrize("step", [1, 9, 16, 17])
def test_resume_from_any_step_is_exact(step: int, finished: TrainState, store: Store) -> None:
    with pytest.raises(Killed):
        run(store, "run", progress=DyingProgress(step))
    assert digest(run(store, "run")) == digest(finished)


def test_the_interval_does_not_change_the_bytes(finished: TrainState, store: Store) -> None:
    config = CONFIG.model_copy(update={"checkpoint_interval": 7})
    assert digest(run(store, "run", config)) == digest(finished)
    with work_area(store, "run") as work:
        assert listed(work) == ["checkpoint-000000007", "checkpoint-000000014"]


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


def program() -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}
    command = [sys.executable, str(Path(__file__).with_name("small.py")), "run"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_kill_9_from_outside_at_random_instants_then_finish(finished: TrainState, store: Store) -> None:
    for _ in range(2):
        before = store.get("work/run/index.json")
        with program() as process:
            while process.poll() is None and store.get("work/run/index.json") == before:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.05))  # anywhere in a step or in the next save
            process.kill()
        assert process.returncode == -9
    with program() as process:
        assert process.stdout is not None
        assert process.stdout.read().strip() == digest(finished)


def test_a_stage_that_fails_has_its_last_checkpoint_committed(store: Store) -> None:
    with pytest.raises(Killed):
        run(store, "run", progress=DyingProgress(13))
    with work_area(store, "run") as work:
        assert listed(work) == ["checkpoint-000000010", "checkpoint-000000012"]
