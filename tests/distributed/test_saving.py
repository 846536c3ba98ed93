"""Checkpoints of real ranks: exact on the layout that wrote them, equal in loss on any other, safe from a kill."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.distributed.checkpoint import Checkpoints
from k2.distributed.objects import Objects
from k2.distributed.retention import Retention, listed, name_of
from k2.store.client import Store
from k2.store.embedded import Server
from k2.store.lease import Lease
from k2.store.work import WorkArea
from tests.distributed.saving import FAR, LAST, SAVED, started, steps

ROOT = Path(__file__).parents[2]
TWO = ["1.1.2", "1.2.1", "2.1.1"]


def launch(ranks: int, folder: Path, tasks: list[str], program: str = "saving.py") -> int:
    """Run a program on so many processes; returns the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(ROOT / "tests/distributed" / program), str(folder), *tasks],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    (folder / "stderr").write_text(run.stderr)
    return run.returncode


@pytest.fixture(scope="module")
def store(s3_server: Server) -> Iterator[Store]:
    """One tenant for this module; the environment points at it, also for the ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        patch.setenv("K2_S3_PREFIX", f"t-{uuid.uuid4().hex[:8]}")
        yield Store.from_environment()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    """Every layout saves, goes on, and resumes; each also resumes what the one before it saved."""
    folder = tmp_path_factory.mktemp("two")
    tasks = [f"save:{name}:{name}" for name in TWO] + [f"resume:{name}:{name}" for name in TWO]
    tasks += [f"resume:{key}:{name}" for key, name in zip(TWO, TWO[1:] + TWO[:1], strict=True)]
    tasks.append("lost:lost:1.1.2")
    assert launch(2, folder, tasks) == 0, (folder / "stderr").read_text()
    return folder


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """Losses of one process."""
    state, source, _ = started(None)
    steps(state, source, None, FAR)
    return state.history.curve("loss")


def continued(store: Store, key: str, expected: int = 2 * SAVED) -> list[float]:
    """Losses of one process that goes on with what ranks saved last."""
    state, source, _ = started(None)
    with Lease(store, f"work/{key}/lease.json") as lease:
        work = WorkArea(store, key, lease)
        assert Checkpoints(work, SAVED).restore(state, source)
        assert listed(work)[-1] == name_of(expected)
        kept = Retention(work, Objects(store, work.base), 2)._references.values()
    assert state.step == expected
    assert set(Objects(store, work.base).digests()) == set().union(*kept)
    steps(state, source, None, FAR)
    return state.history.curve("loss")


def held(folder: Path, task: str, ranks: int) -> list[str]:
    return [(folder / f"{task}.{rank}").read_text() for rank in range(ranks)]


def losses(folder: Path, task: str) -> list[float]:
    found: list[float] = json.loads((folder / f"{task}.json").read_text())
    return found


@pytest.mark.parametrize("name", TWO)
def test_the_same_layout_goes_on_to_the_same_bytes(two: Path, name: str) -> None:
    assert held(two, f"resume:{name}:{name}", 2) == held(two, f"save:{name}:{name}", 2)


@pytest.mark.parametrize(("key", "name"), list(zip(TWO, TWO[1:] + TWO[:1], strict=True)))
def test_another_layout_goes_on_with_the_same_losses(two: Path, key: str, name: str, alone: list[float]) -> None:
    assert losses(two, f"resume:{key}:{name}") == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("key", TWO)
def test_one_process_goes_on_with_what_ranks_saved(two: Path, store: Store, key: str, alone: list[float]) -> None:
    assert continued(store, key) == pytest.approx(alone, rel=1e-9)


def test_a_rank_without_a_store_is_named_by_all_at_once(two: Path, store: Store) -> None:
    """Its word does not go through the store, so that nobody waits for what cannot come."""
    for said in held(two, "lost:lost:1.1.2", 2):
        assert re.match(
            rf"the checkpoint was not saved: {name_of(0)}, rank 1: tried for \d s: cannot write"
            rf" {store.url('work/lost/objects')}/\w+ at http://127\.0\.0\.1:1: unreachable .*; .* keeps none$",
            said,
        )


@pytest.mark.slow
def test_four_ranks_go_on_with_what_two_saved_and_back(
    two: Path, tmp_path: Path, store: Store, alone: list[float]
) -> None:
    tasks = [f"resume:{TWO[0]}:1.2.2", f"resume:{TWO[2]}:2.2.1", "save:four:2.1.2"]
    assert launch(4, tmp_path, tasks) == 0, (tmp_path / "stderr").read_text()
    for task in tasks[:2]:
        assert losses(tmp_path, task) == pytest.approx(alone, rel=1e-9)
    assert losses(tmp_path, tasks[2]) == pytest.approx(alone[:LAST], rel=1e-9)
    assert continued(store, "four") == pytest.approx(alone, rel=1e-9)


def test_a_rank_killed_while_it_uploads_leaves_the_checkpoint_before(
    tmp_path: Path, store: Store, alone: list[float]
) -> None:
    assert launch(2, tmp_path, ["die:killed:1.1.2"]) != 0
    assert continued(store, "killed", expected=SAVED) == pytest.approx(alone, rel=1e-9)
