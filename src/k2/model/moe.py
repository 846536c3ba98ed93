"""Mixture of experts: sigmoid router with a selection bias, routed experts without dropped tokens, shared experts.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); scaling and balancing as in Moonlight (arXiv 2502.16982, app. C).
Every (token, choice) pair becomes a row; rows are ordered by expert, so that each expert is one matrix product.

Letters in shapes: T tokens, S choices per token, E experts, C rows per expert, N rows, D hidden, F expert hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.config.model import ModelConfig
from k2.model.layers import GatedMLP, swiglu, upcast
from k2.model.layout import routed_scaling

WeightTransform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens: chosen experts, their weights, and all unbiased scores."""

    experts_TS: Tensor
    weights_TS: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Sigmoid scores in float32; a bias that no gradient reaches takes part in the choice only."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling = routed_scaling(config)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Routing:
        """Choose S experts per token."""
        scores_TE = F.linear(upcast(x_TD), upcast(self.weight)).sigmoid()
        experts_TS = self._choose(scores_TE.detach() + self.e_score_correction_bias)
        weights_TS = scores_TE.gather(1, experts_TS)
        if self.config.norm_topk_prob:
            weights_TS = weights_TS / (weights_TS.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts_TS, weights_TS * self.scaling, scores_TE)

    def _choose(self, scores_TE: Tensor) -> Tensor:
        if self.config.n_group > 1:
            grouped = scores_TE.view(scores_TE.shape[0], self.config.n_group, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
            closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=best.device).scatter_(1, best, False)
            scores_TE = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
        return scores_TE.topk(self.config.num_experts_per_tok, dim=-1).indices


def balance_loss(routing: Routing, sequences: int) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss (equations 17-20) without its weight alpha, mean over sequences."""
    scores = routing.scores_TE.view(sequences, -1, routing.scores_TE.shape[-1])
    experts = routing.experts_TS.view(sequences, -1, routing.experts_TS.shape[-1])
    count = scores.shape[-1]
    chosen = F.one_hot(experts, count).sum((1, 2)).to(scores.dtype)
    load = chosen * count / (experts.shape[1] * experts.shape[2])
    share = (scores / scores.sum(-1, keepdim=True)).mean(1)
    loss: Tensor = (load * share).sum(-1).mean()
    return loss


def bias_step(counts_E: Tensor) -> Tensor:
    """Direction [E] of the selection bias: sign(violation) minus its mean (Moonlight, appendix C).

    `counts_E` are tokens per expert over the whole batch; under-loaded experts rise.
    """
    loads = counts_E.to(torch.float32)
    signs = torch.sign(loads.mean(-1, keepdim=True) - loads)
    return signs - signs.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Blocks:
    """Rows ordered by expert: `slots_TS` is the row of each (token, choice), `source_N` the pair of each row.

    Expert e owns `counts[e]` contiguous rows.
    """

    slots_TS: Tensor
    source_N: Tensor
    counts: list[int]


def arrange(experts_TS: Tensor, count: int) -> Blocks:
    """Order (token, choice) pairs by expert, pairs of one expert in token order."""
    chosen = experts_TS.flatten()
    order = chosen.argsort(stable=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    return Blocks(slots.view_as(experts_TS), order, torch.bincount(chosen, minlength=count).tolist())


class _Gather(torch.autograd.Function):
    """x_TD -> rows_ND; the gradient sums a token's rows in a fixed order, where index_add would not."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        return x_TD.index_select(0, blocks.source_N // blocks.slots_TS.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grad_ND, ctx.blocks.slots_TS), None


class _Combine(torch.autograd.Function):
    """rows_ND -> x_TD, each token the sum of its rows."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        return _sum_rows(rows_ND, blocks.slots_TS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        blocks: Blocks = ctx.blocks
        return grad_TD.index_select(0, blocks.source_N // blocks.slots_TS.shape[1]), None


def _sum_rows(rows_ND: Tensor, slots_TS: Tensor) -> Tensor:
    return F.embedding_bag(slots_TS, rows_ND, mode="sum")


class _SegmentProduct(torch.autograd.Function):
    """rows_NI x weight_EOI^T, expert by expert over contiguous rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        output = rows.new_empty(rows.shape[0], weight.shape[1])
        for x, w, y in zip(rows.split_with_sizes(counts), weight, output.split_with_sizes(counts), strict=True):
            if len(x):
                torch.mm(x, w.T, out=y)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        pieces = zip(
            grad.split_with_sizes(ctx.counts),
            rows.split_with_sizes(ctx.counts),
            grad_rows.split_with_sizes(ctx.counts),
            strict=True,
        )
        for (g, x, gx), w, gw in zip(pieces, weight, grad_weight, strict=True):
            torch.mm(g, w, out=gx)
            torch.mm(g.T, x, out=gw)
        return grad_rows, grad_weight, None


def grouped_product(rows: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
    """Multiply each expert's rows [., I] with its matrix of `weight` [E, O, I]; gives [N, O].

    One product per expert, straight into its slice: batched products over blocks padded to the largest
    expert were slower at every shape measured, because routing is never quite balanced.
    """
    result: Tensor = _SegmentProduct.apply(rows, weight, blocks.counts)  # type: ignore[no-untyped-call]
    return result


class Experts(nn.Module):
    """Routed experts as two stacked parameters; `weight_transform` is where INT4-aware training hooks in."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.weight_transform: WeightTransform | None = None

    def forward(self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, [T, D]."""
        blocks = arrange(experts_TS, self.gate_up_proj.shape[0])
        rows: Tensor = _Gather.apply(x_TD, blocks)  # type: ignore[no-untyped-call]
        inner = swiglu(grouped_product(rows, self._weight(self.gate_up_proj, x_TD.dtype), blocks))
        # A scalar commutes with the down projection, and the inner rows are the narrower ones.
        inner = inner * weights_TS.flatten()[blocks.source_N].to(x_TD.dtype)[:, None]
        outputs = grouped_product(inner, self._weight(self.down_proj, x_TD.dtype), blocks)
        result: Tensor = _Combine.apply(outputs, blocks)  # type: ignore[no-untyped-call]
        return result

    def _weight(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        weight = parameter if self.weight_transform is None else self.weight_transform(parameter)
        return weight.to(dtype)


class Dispatcher(Protocol):
    """Carries tokens to the experts and back: here, or across expert-parallel ranks."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Weighted sum [T, D] of the outputs of every token's chosen experts."""


def local_dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """All experts are here."""
    result: Tensor = experts(x_TD, routing.experts_TS, routing.weights_TS)
    return result


class MixtureOfExperts(nn.Module):
    """Routed plus shared experts; parameters are named as in Hugging Face's `mlp`, experts stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts, hidden, width)
        self.shared_experts = GatedMLP(hidden, width * config.n_shared_experts) if config.n_shared_experts else None
        self.dispatch: Dispatcher = local_dispatch

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Routing]:
        """[B, L, D] -> [B, L, D], and the routing for statistics and the balance loss."""
        x_TD = x_BLD.flatten(0, 1)
        routing = self.gate(x_TD)
        output = self.dispatch(x_TD, routing, self.experts).view_as(x_BLD)
        return output if self.shared_experts is None else output + self.shared_experts(x_BLD), routing
