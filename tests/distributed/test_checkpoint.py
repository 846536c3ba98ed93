"""Checkpoints of one process through the store: exact, verified, atomic, and nothing goes that somebody reads."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from k2.distributed import checkpoint
from k2.distributed.checkpoint import Checkpoints
from k2.distributed.objects import Objects
from k2.distributed.retention import Retention, listed, opened
from k2.errors import StageError, UserError
from k2.store.client import Store, StoreError
from k2.store.lease import Lease
from k2.store.work import WorkArea
from k2.training.state import TrainState
from tests.distributed.saving import Rows, started
from tests.distributed.saving import steps as make_steps
from tests.training.small import digest

KEY = "stage"


def fresh(seed: int = 0) -> tuple[TrainState, Rows]:
    state, source, _ = started(None)
    state.model.initialize(seed)
    return state, source


def steps(state: TrainState, source: Rows, until: int, checkpoints: Any = None) -> None:
    make_steps(state, source, None, until, checkpoints)


@pytest.fixture
def work(store: Store) -> Iterator[WorkArea]:
    with Lease(store, f"work/{KEY}/lease.json") as lease:
        yield WorkArea(store, KEY, lease)


@pytest.fixture
def small_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BUCKET_BYTES", 20_000)


def corrupt(objects: Objects, digests: set[str]) -> None:
    for name in digests:
        objects.store.put(f"{objects.base}/objects/{name}", b"torn")


def references(work: WorkArea) -> dict[str, set[str]]:
    """Objects of every checkpoint."""
    return dict(Retention(work, Objects(work.store, work.base), 2)._references)


def test_a_restored_run_makes_the_same_bytes(work: WorkArea, small_objects: None) -> None:
    straight, source = fresh()
    checkpoints = Checkpoints(work, 2)
    steps(straight, source, 7, checkpoints)
    checkpoints.wait()
    assert listed(work) == ["checkpoint-000000004", "checkpoint-000000006"]
    state, source = fresh(seed=1)
    torch.manual_seed(5)
    assert Checkpoints(work, 2).restore(state, source)
    assert state.step == 6
    steps(state, source, 7)
    assert digest(state) == digest(straight)


def test_there_may_be_nothing_to_restore(work: WorkArea) -> None:
    state, source = fresh()
    before = digest(state)
    assert not Checkpoints(work, 2).restore(state, source)
    assert digest(state) == before


def test_what_training_does_after_the_snapshot_is_not_saved(work: WorkArea, monkeypatch: pytest.MonkeyPatch) -> None:
    state, source = fresh()
    steps(state, source, 2)
    expected = digest(state)
    checkpoints = Checkpoints(work, 1)
    put, waited = Objects.put, []

    def slow(objects: Objects, data: bytes) -> str:
        waited.append(changed.wait(10))
        return put(objects, data)

    changed = threading.Event()
    monkeypatch.setattr(Objects, "put", slow)
    assert checkpoints.step(state, source)
    steps(state, source, 3)
    changed.set()
    checkpoints.wait()
    assert all(waited)
    other, source = fresh(1)
    Checkpoints(work, 1).restore(other, source)
    assert digest(other) == expected


@pytest.mark.parametrize("manifest", [False, True])
def test_a_corrupt_checkpoint_is_passed_over(
    work: WorkArea, small_objects: None, caplog: pytest.LogCaptureFixture, manifest: bool
) -> None:
    state, source = fresh()
    checkpoints = Checkpoints(work, 1)
    steps(state, source, 2, checkpoints)
    checkpoints.wait()
    objects, names = Objects(work.store, work.base), references(work)
    old, new = names["checkpoint-000000001"], names["checkpoint-000000002"]
    if manifest:
        found = json.loads(work.store.get(f"{work.base}/index.json") or b"")["checkpoint-000000002"]
        work.store.put(found["object"], b"torn")
    else:
        corrupt(objects, {max(new - old)})
    other, source = fresh(1)
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(work, 1).restore(other, source)
    assert other.step == 1
    assert "checkpoint-000000002 cannot be read, taking the one before" in caplog.text
    corrupt(objects, old)
    with pytest.raises(StageError, match="is corrupt"):
        Checkpoints(work, 1).restore(other, source)


def test_a_checkpoint_of_another_model_is_refused_with_both_values(work: WorkArea) -> None:
    state, source = fresh()
    Checkpoints(work, 1).save(state, source)
    state.model.config = state.model.config.model_copy(update={"hidden_size": 40})
    with pytest.raises(UserError, match=r"another model: model\.hidden_size is 32 there and 40 here"):
        Checkpoints(work, 1).restore(state, source)


def failing(after: int) -> Callable[[Objects, bytes], str]:
    """A `put` for a store that goes away after some objects."""
    put, left = Objects.put, [after]

    def fail(objects: Objects, data: bytes) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise StoreError("away")
        return put(objects, data)

    return fail


@pytest.mark.parametrize("after", [0, 3])
def test_a_torn_upload_changes_nothing_and_training_goes_on(
    work: WorkArea, small_objects: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    state, source = fresh()
    checkpoints = Checkpoints(work, 1)
    steps(state, source, 1, checkpoints)
    checkpoints.wait()
    before = set(Objects(work.store, work.base).digests())
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", failing(after))
        checkpoints.step(state, source)
        with caplog.at_level(logging.WARNING):
            checkpoints.step(state, source)
        assert "a checkpoint was not saved, training goes on: away" in caplog.text
        with pytest.raises(StageError, match="the checkpoint was not saved: away"):
            checkpoints.save(state, source)
    assert listed(work) == ["checkpoint-000000001"]
    steps(state, source, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", failing(3))
        with pytest.raises(StageError):
            checkpoints.save(state, source)
    objects = Objects(work.store, work.base)
    assert len(set(objects.digests()) - before) == 3
    other, source = fresh(1)
    assert Checkpoints(work, 1).restore(other, source)
    assert set(objects.digests()) == before


def test_nothing_goes_that_somebody_reads(store: Store, work: WorkArea, small_objects: None) -> None:
    state, source = fresh()
    checkpoints, objects = Checkpoints(work, 1), Objects(work.store, work.base)
    steps(state, source, 1, checkpoints)
    checkpoints.wait()
    with opened(store, KEY) as (manifest, index, _):
        assert manifest["values"]["step"] == 1
        steps(state, source, 5, checkpoints)
        checkpoints.wait()
        assert listed(work) == ["checkpoint-000000004", "checkpoint-000000005"]
        for name in index.digests():
            objects.get(name)
        Checkpoints(work, 1).restore(*fresh(1))
        for name in index.digests():
            objects.get(name)
    assert objects.being_read() == set()
    steps(state, source, 6, checkpoints)
    checkpoints.wait()
    checkpoints._background.submit(int).result()  # old objects are deleted after the commit
    assert set(objects.digests()) == set().union(*references(work).values())


def test_a_reader_without_a_checkpoint_is_told(store: Store) -> None:
    with pytest.raises(StageError, match="has no checkpoint"), opened(store, "nothing"):
        pass
