"""What every rank of the tests runs: `torchrun program.py FOLDER pp.ep.dp ...` trains by each layout and saves the end.

In a layout pp may be AxB for B slices a rank. It may have notes: `recompute`, `offload` (what is not computed again
waits on the host), `fp8` (storage), `narrow` (bfloat16 weights), `buckets` (many small ones), `differs` (ranks are
configured differently), `other` (their code is), `float32` (20 steps in float32, compared with the choices in
`choices.pt`), `replayed` (with those choices).

Rank 0 leaves `<layout>.pt` with the whole model and the reports, all ranks together what they publish in
`<layout>.model`; every rank leaves `<layout>.<rank>.pt` with digests of what it holds. A layout that is refused leaves
its message in `<layout>.<rank>.txt`.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.data.loader import ArrayCorpus, TokenLoader
from k2.distributed import zero
from k2.distributed.mesh import Mesh, join
from k2.distributed.plan import DistributedPlan
from k2.distributed.publish import write_weights
from k2.distributed.replay import Choices, part_of
from k2.errors import UserError
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.planner.layout import PUBLISHED_RECOMPUTE, Layout
from k2.training.batches import NextTokenLoss, micro_batches
from k2.training.loop import ParallelPlan, SingleProcess, train_step
from k2.training.state import TrainState
from tests.training.small import MODEL, corpus

ROWS, LENGTH, MICRO_ROWS = 8, 16, 1
CONFIG: ModelConfig = MODEL.model_copy(update={"num_hidden_layers": 4})
OPTIMIZER = OptimizerConfig(tau=0.5, bias_update_speed=0.01, max_grad_norm=0.05, newton_schulz_bf16=False)


def model(dtype: torch.dtype, notes: Sequence[str] = ()) -> Transformer:
    """The same everywhere."""
    return typed(empty(dtype, notes).initialize(0), dtype, notes)


def typed(model: Transformer, dtype: torch.dtype, notes: Sequence[str]) -> Transformer:
    """With weights of the type that the notes ask for."""
    return model.narrow() if "narrow" in notes else model.to(dtype)


def empty(dtype: torch.dtype, notes: Sequence[str] = ()) -> Transformer:
    """Without its values."""
    return Transformer(
        CONFIG,
        compute_dtype=dtype,
        recompute=("layers",) if "recompute" in notes else PUBLISHED_RECOMPUTE if "offload" in notes else (),
        fp8_storage="fp8" in notes,
        offload_activations="offload" in notes,
    )


def train(state: TrainState, steps: int, plan: ParallelPlan) -> list[dict[str, Any]]:
    """A few steps on one rank's part of the data; returns the reports."""
    loader = TokenLoader(ArrayCorpus(*corpus()), ROWS, LENGTH, 0, plan.data_rank, plan.layout.data_parallel)
    reports = []
    for _ in range(steps):
        batch = loader.next_batch()
        parts = micro_batches(batch.tokens_BL, batch.targets_BL, MICRO_ROWS, batch.document_BL)
        reports.append(train_step(state, parts, NextTokenLoss(0.01), lambda tokens: 0.01, plan).row())
    return reports


def alone(dtype: torch.dtype, steps: int, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The same steps in one process."""
    whole = model(dtype, notes)
    state = TrainState(whole, MuonClip(whole.named_parameters(), logical_tensors(CONFIG), OPTIMIZER))
    with Choices(whole) as choices:
        reports = train(state, steps, SingleProcess())
    clips = state.optimizer.qk_clip.counts
    size = state_size(state)
    return {"weights": whole.state_dict(), "reports": reports, "clips": clips, "choices": choices.seen(), "state": size}


class Maxima:
    """Within its context, notes what this rank brings to every MAX all-reduce, and what it gets."""

    def __init__(self) -> None:
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self._reduce = dist.all_reduce
        dist.all_reduce = self._noted
        return self.found

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._reduce

    def _noted(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        before = tensor.clone()
        work = self._reduce(tensor, op, **options)
        if op == dist.ReduceOp.MAX:
            self.found.append((before, tensor.clone()))
        return work


def together(mesh: Mesh, notes: list[str], choices: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the ranks hold in the end, and what this one does."""
    dtype, steps, expected = torch.float32 if "narrow" in notes else torch.float64, 5, None
    if "float32" in notes:
        dtype, steps = torch.float32, 20
        expected = part_of(torch.load(choices), steps, mesh.data_rank, mesh.layout.data_parallel)
    with torch.device("meta"):
        part = typed(empty(dtype, notes), dtype, notes)
    plan = DistributedPlan(mesh, part, seed=0)
    state = TrainState(part, plan.optimizer(OPTIMIZER))
    with Choices(part, expected, "replayed" in notes) as chosen, Maxima() as maxima:
        reports = train(state, steps, plan)
    write_weights(part.state_dict(), plan.published(part), folder)
    dense = {n: digest(w) for n, w in sorted(part.state_dict().items()) if ".experts." not in n}
    experts = {n: digest(w) for n, w in sorted(part.state_dict().items()) if ".experts." in n}
    own = {
        "dense": dense,
        "experts": experts,
        "state": state_size(state),
        "maxima": maxima,
        "buffers": buffers(plan),
        "flips": chosen.flips,
        "choices": chosen.tokens,
    }
    return {"weights": dict(plan.weights()), "reports": reports, "clips": state.optimizer.qk_clip.counts}, own


def buffers(plan: DistributedPlan) -> list[str]:
    """Where the pipeline's receive buffers are after a step."""
    schedule = plan._pipeline[1]._schedule if plan._pipeline else None
    stages = [] if schedule is None else getattr(schedule, "_stages", None) or [schedule._stage]
    infos = (
        each for stage in stages for kind in (stage.args_recv_info, stage.grad_recv_info) for each in kind.values()
    )
    return [info.buffer.device.type for each in infos for info in each if info.buffer is not None]


def state_size(state: TrainState) -> int:
    """Values of momentum and AdamW's averages."""
    return sum(t.numel() for n, t in state.optimizer.state_dict().items() if n.startswith(("momentum", "exp")))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def layout_of(name: str) -> tuple[Layout, list[str]]:
    """`2x2.1.2.note` as two pipeline stages of two slices, one expert-parallel rank, two replicas; and the notes."""
    stages, ep, dp, *notes = name.split(".")
    pp, _, virtual = stages.partition("x")
    return Layout(int(pp), int(ep), int(dp), int(virtual or 1), micro_batch_tokens=MICRO_ROWS * LENGTH), notes


def main(folder: Path, names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    for name in names:
        layout, notes = layout_of(name)
        config = {"config": {"lr": 0.01 + rank if "differs" in notes else 0.01}, "code": rank * ("other" in notes)}
        try:
            mesh = join(layout, CONFIG, batch_tokens=ROWS * LENGTH, context=LENGTH, identity=config)
        except UserError as error:
            (folder / f"{name}.{rank}.txt").write_text(str(error))
            continue
        zero.BUCKET_VALUES = 1999 if "buckets" in notes else 1 << 26
        whole, own = together(mesh, notes, folder / "choices.pt", folder / f"{name}.model")
        torch.save(own, folder / f"{name}.{rank}.pt")
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
