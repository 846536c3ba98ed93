"""Stage `pretrain`: train the model from scratch on the packed tokens."""

import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from k2.config.pretrain import PretrainConfig
from k2.data.ledger import Span
from k2.data.mixture import Mixture
from k2.data.prefetch import Prefetch
from k2.data.shards import INDEX
from k2.data.streaming import ArtifactFiles, stream
from k2.distributed.checkpoint import Checkpoints
from k2.distributed.plan import DistributedPlan
from k2.distributed.publish import publish, write_weights
from k2.distributed.watchdog import Watchdog
from k2.execution.contract import Progress, StageResult
from k2.execution.digest import code_digest
from k2.model import hf
from k2.model.backend import use_kernels
from k2.processes import rank
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.training.instruments import head_statistics
from k2.training.loop import ParallelPlan
from k2.training.pretraining import build, join_ranks, mixture_of, pretrain, schedule_of
from k2.training.state import TrainState


def run(
    config: PretrainConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Write a checkpoint artifact: `config.json`, `model/`, `tokenizer/` and `report.json`.

    Under torchrun all ranks call it, and the first one publishes.

    Raises UserError when the held-out text is shorter than one row, a domain that `data.mixture` weighs is not there or
    the ranks cannot train together, StageError when too many updates in a row had to be skipped.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    use_kernels(config.kernels)
    tokens = inputs["tokens"]
    mesh = join_ranks(config, {"code": code_digest(__name__), "tokens": tokens.digest})
    state, plan = build(config, mesh)
    heldout = np.load(tokens.path("heldout/tokens.npy"), mmap_mode="r")
    watchdog = nullcontext() if mesh is None else Watchdog(mesh.rank, mesh.world_size, config.parallel.hang_timeout_s)
    work, owner = output.work if rank() == 0 else None, plan if isinstance(plan, DistributedPlan) else None
    patience = config.data.patience_s
    with (
        watchdog,
        Checkpoints(work, config.checkpoint_interval, owner, patience_s=patience) as checkpoints,
        Prefetch(_mixture(config, tokens, plan), config.data.prefetch_steps) as loader,
    ):
        pretrain(config, state, plan, loader, heldout, checkpoints, progress)
    write_weights(state.model.state_dict(), plan.published(state.model), output.path("model/index").parent)
    if rank() == 0:
        _write(config, state, tokens, output)
    return StageResult(publish(output, **_metrics(state)))


def _mixture(config: PretrainConfig, tokens: Artifact, plan: ParallelPlan) -> Mixture:
    files = ArtifactFiles(tokens, "train", config.data.patience_s)
    return mixture_of(config, stream(json.loads(files.read(INDEX)), files, config.data.cache_mb << 20), plan)


def _write(config: PretrainConfig, state: TrainState, tokens: Artifact, output: ArtifactWriter) -> None:
    """What lies beside the weights."""
    values = hf.to_hf_config(state.model.config) | hf.dtype_fields("fp32")
    hf.write_config(values, output.path("config.json").parent)
    for name in tokens.files:
        if name.startswith("tokenizer/"):
            shutil.copyfile(tokens.path(name), output.path(name))
    output.path("report.json").write_text(json.dumps(_report(config, state), sort_keys=True), encoding="utf-8")


def _metrics(state: TrainState) -> dict[str, Any]:
    losses, heldout = state.history.curve("loss"), [note["loss"] for note in state.notes["heldout"]]
    counts = state.optimizer.qk_clip.counts
    return {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "tokens": state.tokens,
        "max_attention_logit": max(logit for row in state.history.curve("max_logits") for logit in row if logit),
        "clipped_heads": int((counts > 0).sum()),
        "clip_events": int(counts.sum()),
        "heldout_loss_first": heldout[0],
        "heldout_loss": heldout[-1],
        "heldout_perplexity": math.exp(heldout[-1]),
    }


def _report(config: PretrainConfig, state: TrainState) -> dict[str, Any]:
    phases = [{"name": p.name, "tokens": p.tokens, "context": p.context_length} for p in schedule_of(config).phases]
    return {
        "curves": state.history.curves(),
        "phases": phases,
        "tau": config.optimizer.tau,
        "spectral_norms": state.notes.get("spectral_norms", []),
        "heldout": state.notes["heldout"],
        "ledger": {"fields": [field.name for field in fields(Span)], "read_once": state.notes["ledger"]},
    } | head_statistics(state)
