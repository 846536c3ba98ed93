"""What every rank of the fault tests runs: `torchrun faults.py FAULT,.. FOLDER` trains, and rank 1 has the faults.

Faults: `hang` (rank 1 stops before a collective), `freeze` (rank 1 is stopped by a signal), `slow` (rank 1 sleeps in
every step), `nan` (rank 1 has a NaN gradient in one step). Rank 0 leaves its reports and events in `FOLDER/0.json`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from k2.config.optimizer import OptimizerConfig
from k2.data.loader import ArrayCorpus, TokenLoader
from k2.distributed.mesh import Mesh, join
from k2.distributed.plan import DistributedPlan
from k2.distributed.watchdog import Watchdog
from k2.model.transformer import Transformer
from k2.planner.layout import Layout
from k2.training.batches import NextTokenLoss, TokenBatch, micro_batches
from k2.training.loop import Loss, train
from k2.training.state import TrainState
from tests.training.small import MODEL, corpus

STEPS, WHEN, TIMEOUT_S = 12, 3, 4.0


class Rows:
    """Steps of a rank's rows."""

    def __init__(self, plan: DistributedPlan) -> None:
        self._loader = TokenLoader(ArrayCorpus(*corpus()), 8, 16, 0, plan.data_rank, plan.layout.data_parallel)
        self.step = 0

    def next_step(self) -> list[TokenBatch]:
        self.step += 1
        batch = self._loader.next_batch()
        return micro_batches(batch.tokens_BL, batch.targets_BL, 4)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Faulty:
    """The loss, and the faults of this rank."""

    def __init__(self, faults: list[str], rows: Rows) -> None:
        self._faults, self._rows, self._loss = faults, rows, NextTokenLoss()

    def __call__(self, model: Transformer, batch: TokenBatch) -> Loss:
        loss = self._loss(model, batch)
        now = self._rows.step == WHEN
        if "hang" in self._faults and now:
            time.sleep(60)
        if "freeze" in self._faults and now:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "slow" in self._faults:
            time.sleep(0.1)
        if "nan" in self._faults and now:
            loss.total.register_hook(lambda gradient: gradient * float("nan"))
        return loss


class Events:
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        self.updates.append({"done": done, **values})

    def event(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, **values})


def run(faults: list[str], mesh: Mesh) -> Events:
    """Train; rank 1 has the faults."""
    model = Transformer(MODEL).initialize(0)
    plan = DistributedPlan(mesh, model)
    state, rows, events = TrainState(model, plan.optimizer(OptimizerConfig())), Rows(plan), Events()
    loss_fn = Faulty(faults if mesh.rank == 1 else [], rows)
    train(state, rows, loss_fn, lambda _: 0.01, until=STEPS, progress=events, plan=plan)
    return events


if __name__ == "__main__":
    torch.set_num_threads(1)
    mesh = join(Layout(dp=2, micro_batch_tokens=64), MODEL, batch_tokens=128, context=16, identity={})
    with Watchdog(mesh.rank, mesh.world_size, TIMEOUT_S):
        events = run(sys.argv[1].split(","), mesh)
    if mesh.rank == 0:
        (Path(sys.argv[2]) / "0.json").write_text(json.dumps(vars(events)))
