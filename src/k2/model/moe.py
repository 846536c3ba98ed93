"""Mixture of experts: sigmoid router with a selection bias, routed experts without dropped tokens, shared experts.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); scaling and balancing as in Moonlight (arXiv 2502.16982, app. C).
Every (token, choice) pair becomes a row; rows are ordered by expert, so that each expert is one matrix product.

Letters in shapes: T tokens, S choices per token, E experts, C rows per expert, N rows, D hidden, F expert hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.config.model import ModelConfig
from k2.model.activations import Keep, keep_it
from k2.model.backend import kernels_for
from k2.model.layers import GatedMLP, gated, gated_backward, upcast
from k2.model.layout import routed_scaling

WeightTransform = Callable[[Tensor], Tensor]

GROUP_ROWS = 256  # experts pass through the layer together until they have so many rows


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens: chosen experts, their weights, and all unbiased scores.

    rows: where the kernels' router sends every pair of a token and an expert; None when torch decided.
    """

    experts_TS: Tensor
    weights_TS: Tensor
    scores_TE: Tensor
    rows: Any = None


class _RouterLogits(torch.autograd.Function):
    """A product in at least float32 that keeps its input as it is, not widened."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(upcast(x_TD), upcast(weight_ED))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD, grad_weight_ED = grad_TE @ upcast(weight_ED), grad_TE.T @ upcast(x_TD)
        return grad_x_TD.to(x_TD.dtype), grad_weight_ED.to(weight_ED.dtype)


class Router(nn.Module):
    """Sigmoid scores in float32; a bias that no gradient reaches takes part in the choice only."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling, self.choices = routed_scaling(config), config.num_experts_per_tok
        self.kernel_fits = config.n_group == 1 and config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Routing:
        """Choose S experts per token."""
        logits_TE: Tensor = _RouterLogits.apply(x_TD, self.weight)  # type: ignore[no-untyped-call]
        if self.kernel_fits and (kernels := kernels_for(x_TD)):
            return Routing(*kernels.routed(logits_TE, self.e_score_correction_bias, self.choices, self.scaling))
        scores_TE = logits_TE.sigmoid()
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
        return scores_TE.topk(self.choices, dim=-1).indices


def balance_loss(routing: Routing, sequences: int) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss (equations 17-20) without its weight alpha, mean over sequences."""
    scores = routing.scores_TE.view(sequences, -1, routing.scores_TE.shape[-1])
    experts = routing.experts_TS.view(sequences, -1, routing.experts_TS.shape[-1])
    count = scores.shape[-1]
    chosen = F.one_hot(experts, count).sum((1, 2)).to(scores.dtype)
    load = chosen * count / (experts.shape[1] * experts.shape[2])
    share = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).mean(1)
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
class Group:
    """Consecutive experts `experts` with `counts` rows each, which are rows `rows` of all."""

    experts: slice
    rows: slice
    counts: list[int]


@dataclass(frozen=True)
class Blocks:
    """Rows ordered by expert: `slots_TS` is the row of each (token, choice), `source_N` the pair of each row.

    `tokens_N` is the token of each row; `groups` partition experts and rows.
    """

    slots_TS: Tensor
    source_N: Tensor
    tokens_N: Tensor
    groups: list[Group]


def arrange(experts_TS: Tensor, count: int) -> Blocks:
    """Order (token, choice) pairs by expert, pairs of one expert in token order."""
    chosen = experts_TS.flatten()
    order = chosen.argsort(stable=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    groups = list(_groups(torch.bincount(chosen, minlength=count).tolist()))
    return Blocks(slots.view_as(experts_TS), order, order // experts_TS.shape[1], groups)


def _groups(counts: list[int]) -> Iterator[Group]:
    expert = row = 0
    for stop in range(1, len(counts) + 1):
        rows = sum(counts[expert:stop])
        if rows >= GROUP_ROWS or stop == len(counts):
            yield Group(slice(expert, stop), slice(row, row + rows), counts[expert:stop])
            expert, row = stop, row + rows


def _multiply(rows: Tensor, weights: Tensor, counts: list[int], result: Tensor) -> None:
    """Expert by expert, its rows [N, I] with its matrix of `weights` [E, I, O], straight into the result [N, O].

    Batched products over blocks padded to the largest expert were slower at every shape measured, because
    routing is never quite balanced.
    """
    parts = rows.split_with_sizes(counts), weights.unbind(), result.split_with_sizes(counts)
    for count, x, weight, out in zip(counts, *parts, strict=True):
        if count:
            torch.mm(x, weight.to(x.dtype), out=out)


def _weight_gradient(grad: Tensor, rows: Tensor, counts: list[int], result: Tensor) -> None:
    """Expert by expert grad^T rows, into the precision of `result` [E, O, I]."""
    parts = grad.split_with_sizes(counts), rows.split_with_sizes(counts), result.unbind()
    for count, g, x, out in zip(counts, *parts, strict=True):
        if not count:
            out.zero_()
        elif out.dtype == x.dtype:
            torch.mm(g.T, x, out=out)
        else:
            out.copy_(g.T @ x)


class _RoutedExperts(torch.autograd.Function):
    """Every token's weighted sum of its experts' outputs, a few experts at a time, so that rows stay in cache.

    Keeps its inputs and what `keep` leaves of the fused gate and up of every row. Weights are cast when used. Sums over
    a token's rows have a fixed order, where index_add would not.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TS: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, blocks: Blocks, keep: Keep
    ) -> Tensor:
        scale_N = weights_TS.flatten()[blocks.source_N]
        gate_up_NG = x_TD.new_empty(len(scale_N), gate_up_EGD.shape[1])
        output_ND = x_TD.new_empty(len(scale_N), x_TD.shape[1])
        for group in blocks.groups:
            rows, gate_up = x_TD.index_select(0, blocks.tokens_N[group.rows]), gate_up_NG[group.rows]
            _multiply(rows, gate_up_EGD[group.experts].mT, group.counts, gate_up)
            # A scalar commutes with the down projection, and the inner rows are the narrower ones.
            inner = gated(gate_up, scale_N[group.rows])
            _multiply(inner, down_EDF[group.experts].mT, group.counts, output_ND[group.rows])
        ctx.blocks = blocks
        ctx.save_for_backward(x_TD, scale_N, gate_up_EGD, down_EDF, keep(gate_up_NG))
        return F.embedding_bag(blocks.slots_TS, output_ND, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        blocks: Blocks = ctx.blocks
        x_TD, scale_N, gate_up_EGD, down_EDF, kept_NG = ctx.saved_tensors
        grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
        grad_scale_N, grad_rows_ND = torch.empty_like(scale_N), x_TD.new_empty(len(scale_N), x_TD.shape[1])
        for group in blocks.groups:
            rows, experts, counts = group.rows, group.experts, group.counts
            grad = grad_TD.index_select(0, blocks.tokens_N[rows])
            grad_inner = grad.new_empty(len(grad), down_EDF.shape[2])
            _multiply(grad, down_EDF[experts], counts, grad_inner)
            x_rows = x_TD.index_select(0, blocks.tokens_N[rows])
            if kept_NG is None:
                gate_up = grad.new_empty(len(grad), gate_up_EGD.shape[1])
                _multiply(x_rows, gate_up_EGD[experts].mT, counts, gate_up)
            else:
                gate_up = kept_NG[rows]
            grad_gate_up, grad_scale_N[rows], inner = gated_backward(grad_inner, gate_up, scale_N[rows])
            _weight_gradient(grad, inner, counts, grad_down_EDF[experts])
            _weight_gradient(grad_gate_up, x_rows, counts, grad_gate_up_EGD[experts])
            _multiply(grad_gate_up, gate_up_EGD[experts], counts, grad_rows_ND[rows])
        grad_x_TD = F.embedding_bag(blocks.slots_TS, grad_rows_ND, mode="sum")
        return grad_x_TD, grad_scale_N[blocks.slots_TS], grad_gate_up_EGD, grad_down_EDF, None, None


class Experts(nn.Module):
    """Routed experts as two stacked parameters; `weight_transform` is where INT4-aware training hooks in."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.weight_transform: WeightTransform | None = None
        self.keep_input: Keep = keep_it
        self.keep_gate_up: Keep = keep_it

    def forward(self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, rows: Any = None) -> Tensor:
        """Weighted sum of the chosen experts' outputs, [T, D]; `rows` as in `Routing`."""
        self.keep_input(x_TD)
        parameters = self.gate_up_proj, self.down_proj
        transform = self.weight_transform
        gate_up, down = parameters if transform is None else (transform(weight) for weight in parameters)
        if kernels := kernels_for(x_TD):
            rows = rows or kernels.arrange(experts_TS, len(down))
            return cast(Tensor, kernels.routed_experts(x_TD, weights_TS, gate_up, down, rows, self.keep_gate_up))
        blocks = arrange(experts_TS, len(down))
        result: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
            x_TD, weights_TS, gate_up, down, blocks, self.keep_gate_up
        )
        return result


class Dispatcher(Protocol):
    """Carries tokens to the experts and back: here, or across expert-parallel ranks."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Callable[[], Tensor]:
        """Send tokens off; what is returned gives the weighted sum [T, D] of their experts' outputs.

        Whatever is computed before it is called runs while the tokens travel.
        """


def local_dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Callable[[], Tensor]:
    """All experts are here."""
    result: Tensor = experts(x_TD, routing.experts_TS, routing.weights_TS, routing.rows)
    return lambda: result


class MixtureOfExperts(nn.Module):
    """Routed plus shared experts; parameters are named as in Hugging Face's `mlp`, experts stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts, hidden, width)
        self.shared_experts = GatedMLP(hidden, width * config.n_shared_experts) if config.n_shared_experts else None
        self.dispatch: Dispatcher = local_dispatch
        self.keep_input: Keep = keep_it

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Routing]:
        """[B, L, D] -> [B, L, D], and the routing for statistics and the balance loss."""
        self.keep_input(x_BLD)
        x_TD = x_BLD.flatten(0, 1)
        routing = self.gate(x_TD)
        routed = self.dispatch(x_TD, routing, self.experts)
        shared_BLD = None if self.shared_experts is None else self.shared_experts(x_BLD)
        output_BLD = routed().view_as(x_BLD)
        return output_BLD if shared_BLD is None else output_BLD + shared_BLD, routing
