"""What every rank of the tests runs: `torchrun program.py FOLDER pp.ep.dp ...` trains by each layout and saves the end.

A layout may have notes: `recompute`, `buckets` (many small ones), `differs` (ranks are configured differently).

Rank 0 leaves `<layout>.pt` with the whole model and the reports; every rank leaves `<layout>.<rank>.pt` with digests
of what it holds. A layout that is refused leaves its message in `<layout>.<rank>.txt`.
"""

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.data.loader import TokenLoader
from k2.distributed import zero
from k2.distributed.mesh import Mesh, join
from k2.distributed.plan import DistributedPlan
from k2.errors import UserError
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.planner.layout import Layout
from k2.training.batches import micro_batches, next_token_loss
from k2.training.loop import ParallelPlan, train_step
from k2.training.state import TrainState
from tests.training.small import MODEL, corpus

STEPS, ROWS, LENGTH, MICRO_ROWS = 5, 8, 16, 2
CONFIG: ModelConfig = MODEL.model_copy(update={"num_hidden_layers": 3})
OPTIMIZER = OptimizerConfig(tau=0.5, bias_update_speed=0.01, max_grad_norm=0.05, newton_schulz_bf16=False)


def model(recompute: bool = False) -> Transformer:
    """The same float64 model everywhere."""
    return Transformer(CONFIG, compute_dtype=torch.float64, recompute=recompute).initialize(0).double()


def train(state: TrainState, rank: int, ranks: int, plan: ParallelPlan | None) -> list[dict[str, Any]]:
    """A few steps on one rank's part of the data; returns the reports."""
    loader = TokenLoader(*corpus(), ROWS, LENGTH, 0, rank, ranks)
    reports = []
    for _ in range(STEPS):
        batch = loader.next_batch()
        parts = micro_batches(batch.tokens_BL, batch.targets_BL, MICRO_ROWS, batch.document_BL)
        reports.append(train_step(state, parts, next_token_loss(0.01), lambda tokens: 0.01, plan).row())
    return reports


def alone() -> dict[str, Any]:
    """The same steps in one process."""
    whole = model()
    state = TrainState(whole, MuonClip(whole.named_parameters(), logical_tensors(CONFIG), OPTIMIZER))
    reports = train(state, 0, 1, None)
    return {"weights": whole.state_dict(), "reports": reports, "clips": state.optimizer.qk_clip.counts}


def together(mesh: Mesh, recompute: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the ranks hold in the end, and what this one does."""
    part = model(recompute)
    plan = DistributedPlan(mesh, part)
    state = TrainState(part, plan.optimizer(OPTIMIZER))
    reports = train(state, mesh.rank, mesh.world_size, plan)
    dense = {n: digest(w) for n, w in sorted(part.state_dict().items()) if ".experts." not in n}
    experts = {n: digest(w) for n, w in sorted(part.state_dict().items()) if ".experts." in n}
    own = {
        "dense": dense,
        "experts": experts,
        "state": sum(t.numel() for n, t in state.optimizer.state_dict().items() if n.startswith(("momentum", "exp"))),
        "held": sum(weight.numel() for weight in part.parameters()),
    }
    return {"weights": plan.state_dict(), "reports": reports, "clips": state.optimizer.qk_clip.counts}, own


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def main(folder: Path, names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    for name in names:
        pp, ep, dp, *notes = name.split(".")
        layout = replace(Layout(int(pp), int(ep), int(dp)), micro_batch_tokens=MICRO_ROWS * LENGTH)
        config = f"config-{rank if 'differs' in notes else 0}"
        try:
            mesh = join(layout, CONFIG, batch_tokens=ROWS * LENGTH, context=LENGTH, digest=config)
        except UserError as error:
            (folder / f"{name}.{rank}.txt").write_text(str(error))
            continue
        zero.BUCKET_VALUES = 999 if "buckets" in notes else 1 << 24
        whole, own = together(mesh, "recompute" in notes)
        torch.save(own, folder / f"{name}.{rank}.pt")
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
