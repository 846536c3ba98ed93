"""Pipeline parallelism: every rank has some slices of the layers, and micro-batches pass through all of them.

The schedule is torch.distributed.pipelining's: interleaved 1F1B (Megatron-LM, arXiv 2104.04473) with several slices a
rank, plain 1F1B with one. Torch carries hidden states and their gradients; what else a slice knows stays where it is:
its part of the balance loss rides on the hidden states, and its statistics are kept until the step ends.

Letters in shapes: B rows of a micro-batch, L length, D hidden, N layers, H heads, M layers with experts, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k2.config.model import ModelConfig
from k2.distributed.mesh import Mesh
from k2.distributed.watchdog import collective, working
from k2.model.transformer import Statistics, Transformer
from k2.planner.layout import layers_of_chunks
from k2.training.batches import NextTokenLoss, TokenBatch
from k2.training.loop import Loss

if TYPE_CHECKING:
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

    from k2.distributed.stage import Stage

    Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class _Ride(torch.autograd.Function):
    """Hidden states as they are; going back they start the gradient of a loss that rides along."""

    @staticmethod
    def forward(ctx: Any, hidden_BLD: Tensor, loss: Tensor) -> Tensor:
        return hidden_BLD.view_as(hidden_BLD)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return grad_BLD, grad_BLD.new_ones(())


class Slice(nn.Module):
    """Some neighbouring layers as torch's pipeline calls them; `losses` gets what every micro-batch contributed."""

    def __init__(self, model: Transformer, loss_fn: NextTokenLoss, losses: list[tuple[int, Loss]]) -> None:
        super().__init__()
        self.model, self._loss_fn, self._losses = model, loss_fn, losses

    def forward(self, inputs: Tensor, targets_BL: Tensor, documents_BL: Tensor | None = None) -> Tensor:
        """Tokens [B, L] or hidden states [B, L, D] to hidden states."""
        with working():
            hidden_BLD, loss = self._loss_fn.through(self.model, TokenBatch(inputs, targets_BL, documents_BL))
        statistics = _spread(self.model, loss.statistics)
        self._losses.append((0, replace(loss, total=loss.total.detach(), statistics=statistics)))
        if loss.total.requires_grad:
            hidden_BLD = _Ride.apply(hidden_BLD, loss.total)  # type: ignore[no-untyped-call]
        return hidden_BLD

    def finish(self, hidden_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        """The loss [] of what the last slice has just returned."""
        _, riding = self._losses.pop()
        loss = self._loss_fn.at_head(self.model, hidden_BLD, targets_BL, riding)
        self._losses.append((targets_BL.numel(), replace(loss, total=loss.total.detach())))
        return loss.total


def _spread(part: Transformer, statistics: Statistics) -> Statistics:
    """A slice's statistics in the places they have in the whole model: elsewhere no logit and no token was seen."""
    config, layers = part.config, [int(layer) for layer in part.layers]
    heads, first = config.num_attention_heads, config.first_k_dense_replace
    max_logits_NH = statistics.max_logits_NH.new_full((config.num_hidden_layers, heads), -torch.inf)
    max_logits_NH[layers] = statistics.max_logits_NH.detach()
    counts_ME = statistics.expert_counts_ME.new_zeros(config.mixture_layers, config.n_routed_experts)
    counts_ME[[layer - first for layer in layers if layer >= first]] = statistics.expert_counts_ME
    return Statistics(max_logits_NH, counts_ME, statistics.balance_loss.detach())


def keep_layers(model: Transformer, mesh: Mesh) -> None:
    """Keep this rank's layers of a whole model, in place."""
    slices = layers_of_mine(model.config, mesh)
    model.layers = nn.ModuleDict({str(layer): model.layers[str(layer)] for part in slices for layer in part})
    if slices[0].start > 0:
        model.embed_tokens = None
    if slices[-1].stop < model.config.num_hidden_layers:
        model.norm = model.lm_head = None


def layers_of_mine(config: ModelConfig, mesh: Mesh) -> list[range]:
    """The layers of each of this rank's slices."""
    layout = mesh.layout
    chunks = layers_of_chunks(config, layout.pp, layout.virtual_stages)
    return list(chunks[mesh.pipeline.rank() :: layout.pp])


def _slice_of(model: Transformer, layers: range) -> Transformer:
    """Neighbouring layers of a model, the very same modules."""
    with torch.device("meta"):
        part = Transformer(model.config, compute_dtype=model.compute_dtype, layers=layers)
    for name, _ in list(part.named_children()):
        setattr(part, name, getattr(model, name))
    part.layers = nn.ModuleDict({str(layer): model.layers[str(layer)] for layer in layers})
    return part


class Pipeline:
    """This rank's part in the schedule of steps that all have micro-batches of one shape, and the same number."""

    def __init__(self, mesh: Mesh, model: Transformer, loss_fn: NextTokenLoss, batches: Sequence[TokenBatch]) -> None:
        # Imported where there is a pipeline, for it takes seconds.
        from k2.distributed.stage import Stage

        self._losses: list[tuple[int, Loss]] = []
        count, chunks = len(batches), mesh.layout.pp * mesh.layout.virtual_stages
        mine = range(mesh.pipeline.rank(), chunks, mesh.layout.pp)
        parts = [_slice_of(model, layers) for layers in layers_of_mine(model.config, mesh)]
        slices = [Slice(part, loss_fn, self._losses) for part in parts]
        shapes = [_shapes(part, batches[0].tokens_BL) for part in parts]
        device = batches[0].tokens_BL.device
        stages = [
            Stage(part, chunk, chunks, device, *shape, group=mesh.pipeline)
            for part, chunk, shape in zip(slices, mine, shapes, strict=True)
        ]
        self._first, self._last = stages[0].is_first, stages[-1].is_last
        self._schedule = _schedule(stages, count, slices[-1].finish, mesh.layout.pp)

    def losses(self, batches: Sequence[TokenBatch]) -> list[tuple[int, Loss]]:
        """Pass the micro-batches through, and back where gradients are enabled: tokens and loss, part by part."""
        self._losses.clear()
        inputs = (torch.cat([batch.tokens_BL for batch in batches]),) if self._first else ()
        keywords: dict[str, Any] = {"targets_BL": torch.cat([batch.targets_BL for batch in batches])}
        if documents := [batch.documents_BL for batch in batches if batch.documents_BL is not None]:
            keywords["documents_BL"] = torch.cat(documents)
        run = self._schedule.step if torch.is_grad_enabled() else self._schedule.eval
        with collective("the pipeline's schedule"):
            run(*inputs, target=keywords["targets_BL"] if self._last else None, return_outputs=False, **keywords)
        return self._losses


def _schedule(stages: "list[Stage]", count: int, loss_fn: Any, ranks: int) -> "Schedule":
    """Sums of losses, not means: gradients must not be divided by the number of micro-batches."""
    from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

    if len(stages) == 1 and count >= ranks:
        return Schedule1F1B(stages[0], count, loss_fn, scale_grads=False)
    return ScheduleInterleaved1F1B(list(stages), count, loss_fn, scale_grads=False)


def _shapes(part: Transformer, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Example input and output of a slice, without memory."""
    hidden_BLD = torch.empty(
        *tokens_BL.shape, part.config.hidden_size, dtype=part.compute_dtype, device="meta", requires_grad=True
    )
    return (tokens_BL.to("meta") if part.embed_tokens is not None else hidden_BLD), hidden_BLD
