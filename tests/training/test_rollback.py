"""A spike takes the run back to its last checkpoint, and past the batch that made it."""

from typing import Any

import numpy as np
import pytest
import torch

from k2.config.optimizer import OptimizerConfig
from k2.distributed.checkpoint import Checkpoints
from k2.errors import StageError
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.store.client import Store
from k2.training.batches import NextTokenLoss, TokenBatch, micro_batches
from k2.training.loop import train
from k2.training.state import TrainState
from tests.training.small import MODEL, corpus, work_area

STEPS = 9


class Batches:
    """Rows of a corpus, some batches of which are noise."""

    def __init__(self, noise: set[int]) -> None:
        self.position, self._noise, self._tokens = 0, noise, corpus()[0].astype(np.int64)

    def next_step(self) -> list[TokenBatch]:
        self.position += 1
        if self.position in self._noise:
            tokens = np.random.default_rng(0).integers(0, 64, 65 * 4)
        else:
            tokens = self._tokens[self.position * 256 :][: 65 * 4]
        return micro_batches(tokens[: 64 * 4].reshape(-1, 16), tokens[1 : 64 * 4 + 1].reshape(-1, 16), 16)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Events:
    def __init__(self, end: int | None = None) -> None:
        self.found: list[tuple[Any, ...]] = []
        self.steps: list[int] = []
        self._end = end

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        self.steps.append(int(done))
        if len(self.steps) == self._end:
            raise KeyboardInterrupt

    def event(self, kind: str, **values: Any) -> None:
        if kind == "rollback":
            self.found.append((values["step"], values["to"], values["batches"]))


def run(
    store: Store, key: str, noise: set[int], end: int | None = None, interval: int = 3, **changes: Any
) -> tuple[TrainState, Events]:
    model = Transformer(MODEL).initialize(0)
    config = OptimizerConfig(spike_margin=0.2, **{"spike_policy": "rollback"} | changes)
    state = TrainState(model, MuonClip(model.named_parameters(), logical_tensors(MODEL), config))
    source, events = Batches(noise), Events(end)
    with work_area(store, key) as work, Checkpoints(work, interval) as checkpoints:
        checkpoints.restore(state, source)
        train(state, source, NextTokenLoss(), lambda _: 0.02, until=STEPS, progress=events, checkpoints=checkpoints)
    return state, events


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in state.model.state_dict().values()])


def test_back_to_the_checkpoint_and_past_the_batch(store: Store) -> None:
    state, events = run(store, "a", {5})
    assert events.found == [(5, 3, 1)]
    assert events.steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    assert state.step == STEPS
    assert state.history.curve("step") == list(range(1, STEPS + 1))
    assert not any(state.history.curve("spike"))
    assert not torch.equal(weights(state), weights(run(store, "b", set())[0]))


@pytest.mark.parametrize("end", [5, 6, 7, 9])
def test_a_run_killed_around_a_rollback_ends_in_the_same_bytes(store: Store, end: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(store, "killed", {5}, end)
    killed, straight = run(store, "killed", {5})[0], run(store, "straight", {5})[0]
    assert torch.equal(weights(killed), weights(straight))
    assert killed.history == straight.history


def test_several_bad_batches_in_a_row_are_all_left_out(store: Store) -> None:
    state, events = run(store, "a", {5, 6})
    assert events.found == [(5, 3, 1), (5, 3, 2)]
    assert state.step == STEPS
    with pytest.raises(StageError, match="2 batches were left out"):
        run(store, "b", {5, 6, 7}, max_skipped_steps=2)


def test_without_a_checkpoint_the_update_is_left_out(store: Store) -> None:
    state, events = run(store, "a", {5}, interval=100)
    assert events.found == []
    assert state.history.curve("skipped") == [0, 0, 0, 0, 1, 0, 0, 0, 0]
