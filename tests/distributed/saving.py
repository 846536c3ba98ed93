"""What the ranks of the checkpoint tests run: `torchrun saving.py FOLDER TASK ...`, the store given by the environment.

A task is `ACTION:KEY:pp.ep.dp`. `save` trains from the start and saves every two steps while it goes on to step 5;
`resume` restores what KEY has and goes on, on another layout to step 24; `die` is `save` with a last rank that is
killed in its second upload; `lost` is one whose last rank has no store. Rank 0 leaves `<task>.json` with the losses,
every rank `<task>.<rank>` with a digest of what it holds, or with what it said.
"""

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2.data.loader import ArrayCorpus, TokenLoader
from k2.distributed import checkpoint
from k2.distributed.checkpoint import Checkpoints
from k2.distributed.mesh import join
from k2.distributed.objects import Objects
from k2.distributed.plan import DistributedPlan
from k2.errors import StageError
from k2.model.layout import logical_tensors
from k2.optim.muonclip import MuonClip
from k2.planner.layout import Layout
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea
from k2.training.batches import NextTokenLoss, micro_batches
from k2.training.loop import train
from k2.training.state import TrainState
from tests.distributed.program import CONFIG, LENGTH, MICRO_ROWS, OPTIMIZER, ROWS, model
from tests.training.small import NoProgress, corpus, digest

SAVED, LAST, FAR = 2, 5, 24


class Rows:
    """One rank's micro-batches."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.loader = TokenLoader(ArrayCorpus(*corpus()), ROWS, LENGTH, 0, rank, ranks)
        self.state_dict, self.load_state_dict = self.loader.state_dict, self.loader.load_state_dict

    def next_step(self) -> Any:
        batch = self.loader.next_batch()
        return micro_batches(batch.tokens_BL, batch.targets_BL, MICRO_ROWS, batch.document_BL)


class Killed(Objects):
    """The store of a rank that is killed in the middle of a later checkpoint than the first."""

    state: TrainState

    def put(self, data: Any) -> str:
        digest = super().put(data)
        work, key, *_ = self.base.split("/")
        if self.state.step > SAVED and self.store.get(f"{work}/{key}/index.json"):  # the first is there as a whole
            os.kill(os.getpid(), signal.SIGKILL)
        return digest


def started(layout: Layout | None) -> tuple[TrainState, Rows, DistributedPlan | None]:
    """A run at its beginning, on one rank of a layout, or in one process."""
    part = model(torch.float64)
    if layout is None:
        optimizer = MuonClip(part.named_parameters(), logical_tensors(CONFIG), OPTIMIZER)
        return TrainState(part, optimizer), Rows(0, 1), None
    mesh = join(layout, CONFIG, batch_tokens=ROWS * LENGTH, context=LENGTH, identity={})
    plan = DistributedPlan(mesh, part)
    return TrainState(part, plan.optimizer(OPTIMIZER)), Rows(plan.data_rank, layout.data_parallel), plan


def steps(state: TrainState, source: Rows, plan: DistributedPlan | None, until: int, checkpoints: Any = None) -> None:
    train(
        state, source, NextTokenLoss(0.01), lambda tokens: 0.01, until=until, plan=plan,
        checkpoints=checkpoints, progress=NoProgress(),
    )  # fmt: skip


def run(folder: Path, task: str, stack: ExitStack) -> None:
    action, key, name = task.split(":")
    pp, ep, dp = (int(number) for number in name.split("."))
    rank, store = dist.get_rank(), Store.from_environment()
    work = None
    if rank == 0:
        work = WorkArea(store, key, stack.enter_context(Lease(store, f"work/{key}/lease.json")))
    state, source, plan = started(Layout(pp, ep, dp, micro_batch_tokens=MICRO_ROWS * LENGTH))
    if action == "die" and rank == dist.get_world_size() - 1:
        Killed.state = state
        checkpoint.Objects = Killed  # type: ignore[misc]
    if action == "lost":
        (folder / f"{task}.{rank}").write_text(lost(work, state, source, plan))
        return
    checkpoints = Checkpoints(work, SAVED, plan)
    if action == "resume":
        assert checkpoints.restore(state, source)
        assert state.step < LAST
    until = FAR if action == "resume" and key != name else LAST
    steps(state, source, plan, until, None if action == "resume" else checkpoints)
    checkpoints.wait()
    (folder / f"{task}.{rank}").write_text(digest(state))
    if rank == 0:
        (folder / f"{task}.json").write_text(json.dumps(state.history.curve("loss")))


def lost(work: WorkArea | None, state: TrainState, source: Rows, plan: DistributedPlan | None) -> str:
    """What is said when the last rank cannot reach the store: neither its objects nor its index get there."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == dist.get_world_size() - 1:
            patch.setenv("K2_S3_ENDPOINT", "http://127.0.0.1:1")
            patch.setenv("K2_S3_RETRIES", "0")
        checkpoints = Checkpoints(work, SAVED, plan, patience_s=0.5)
    with checkpoints, pytest.raises(StageError) as error:
        checkpoints.save(state, source)
    return str(error.value)


def main(folder: Path, tasks: list[str]) -> None:
    checkpoint.BUCKET_BYTES = 20_000
    dist.init_process_group("gloo")
    for task in tasks:
        with ExitStack() as stack:
            run(folder, task, stack)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
