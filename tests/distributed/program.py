"""What every rank of the tests runs: `torchrun program.py FOLDER pp.ep.dp ...` trains by each layout and saves the end.

A layout may have notes: `recompute`, `buckets` (many small ones), `differs` (ranks are configured differently),
`float32` (20 steps in float32, compared with the choices in `choices.pt`), `replayed` (with
those choices).

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
from k2.model.moe import Router
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.planner.layout import Layout
from k2.training.batches import micro_batches, next_token_loss
from k2.training.loop import ParallelPlan, train_step
from k2.training.state import TrainState
from tests.training.small import MODEL, corpus

ROWS, LENGTH, MICRO_ROWS = 8, 16, 2
CONFIG: ModelConfig = MODEL.model_copy(update={"num_hidden_layers": 3})
OPTIMIZER = OptimizerConfig(tau=0.5, bias_update_speed=0.01, max_grad_norm=0.05, newton_schulz_bf16=False)


def model(dtype: torch.dtype, recompute: bool = False) -> Transformer:
    """The same everywhere."""
    return Transformer(CONFIG, compute_dtype=dtype, recompute=recompute).initialize(0).to(dtype)


class Choices:
    """Notes what every router chooses, in order, and counts tokens for whom `expected` says otherwise."""

    def __init__(self, expected: torch.Tensor | None, impose: bool) -> None:
        self.seen: list[torch.Tensor] = []
        self.flips = 0
        self._expected, self._impose, self._choose = expected, impose, Router._choose

    def __enter__(self) -> "Choices":
        Router._choose = lambda router, scores: self._next(self._choose(router, scores))
        return self

    def __exit__(self, *_: object) -> None:
        Router._choose = self._choose

    def _next(self, experts_TS: torch.Tensor) -> torch.Tensor:
        self.seen.append(experts_TS)
        if self._expected is None:
            return experts_TS
        expected_TS = self._expected[len(self.seen) - 1]
        self.flips += int((experts_TS.sort().values != expected_TS.sort().values).any(1).sum())
        return expected_TS if self._impose else experts_TS


def train(state: TrainState, steps: int, rank: int, ranks: int, plan: ParallelPlan | None) -> list[dict[str, Any]]:
    """A few steps on one rank's part of the data; returns the reports."""
    loader = TokenLoader(*corpus(), ROWS, LENGTH, 0, rank, ranks)
    reports = []
    for _ in range(steps):
        batch = loader.next_batch()
        parts = micro_batches(batch.tokens_BL, batch.targets_BL, MICRO_ROWS, batch.document_BL)
        reports.append(train_step(state, parts, next_token_loss(0.01), lambda tokens: 0.01, plan).row())
    return reports


def alone(dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """The same steps in one process; `choices` is [steps, micro-batches, layers with experts, tokens, choices]."""
    whole = model(dtype)
    state = TrainState(whole, MuonClip(whole.named_parameters(), logical_tensors(CONFIG), OPTIMIZER))
    with Choices(None, False) as choices:
        reports = train(state, steps, 0, 1, None)
    chosen = torch.stack(choices.seen).view(steps, ROWS // MICRO_ROWS, -1, *choices.seen[0].shape)
    clips = state.optimizer.qk_clip.counts
    return {"weights": whole.state_dict(), "reports": reports, "clips": clips, "choices": chosen}


def together(mesh: Mesh, notes: list[str], choices: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the ranks hold in the end, and what this one does."""
    dtype, steps, expected = torch.float64, 5, None
    if "float32" in notes:
        dtype, steps = torch.float32, 20
        expected = torch.load(choices).chunk(mesh.world_size, 1)[mesh.rank].flatten(0, 2)
    part = model(dtype, "recompute" in notes)
    plan = DistributedPlan(mesh, part)
    state = TrainState(part, plan.optimizer(OPTIMIZER))
    with Choices(expected, "replayed" in notes) as chosen:
        reports = train(state, steps, mesh.rank, mesh.world_size, plan)
    dense = {n: digest(w) for n, w in sorted(part.state_dict().items()) if ".experts." not in n}
    experts = {n: digest(w) for n, w in sorted(part.state_dict().items()) if ".experts." in n}
    own = {
        "dense": dense,
        "experts": experts,
        "state": sum(t.numel() for n, t in state.optimizer.state_dict().items() if n.startswith(("momentum", "exp"))),
        "flips": chosen.flips,
        "choices": sum(len(experts_TS) for experts_TS in chosen.seen),
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
        whole, own = together(mesh, notes, folder / "choices.pt")
        torch.save(own, folder / f"{name}.{rank}.pt")
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
