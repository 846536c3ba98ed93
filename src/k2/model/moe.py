"""Mixture of experts: sigmoid router with a selection bias, routed experts without dropped tokens, shared experts.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); scaling and balancing as in Moonlight (arXiv 2502.16982, app. C).
Letters in shapes: B batch, L length, T tokens, S choices per token, E experts, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.config.model import ModelConfig
from k2.kernels.cpu.routing import choose_experts, router_scores, sparse_outer, sparse_project_back
from k2.model.activations import Keep, keep_it
from k2.model.backend import chooses_in_c, kernels_for, runs_in_c
from k2.model.experts import arrange, routed_experts
from k2.model.layers import GatedMLP, upcast
from k2.model.layout import routed_scaling

WeightTransform = Callable[[Tensor], Tensor]


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
        return _logits_backward(grad_TE, *ctx.saved_tensors)


def _logits_backward(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    grad_x_TD, grad_weight_ED = grad_TE @ upcast(weight_ED), grad_TE.T @ upcast(x_TD)
    return grad_x_TD.to(x_TD.dtype), grad_weight_ED.to(weight_ED.dtype)


class _Choice(torch.autograd.Function):
    """Chosen experts, their scores, and all scores, which few ask a gradient for: then only chosen logits have one."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ED: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide_ED = upcast(weight_ED)
        scores_TE = router_scores(x_TD, wide_ED) if runs_in_c(x_TD) else F.linear(upcast(x_TD), wide_ED).sigmoid_()
        experts_TS = choose(scores_TE)
        chosen_TS = scores_TE.gather(1, experts_TS)
        ctx.save_for_backward(x_TD, weight_ED, experts_TS, chosen_TS, scores_TE)
        ctx.mark_non_differentiable(experts_TS)
        ctx.set_materialize_grads(False)
        return experts_TS, chosen_TS, scores_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad_TS: Tensor | None, grad_TE: Tensor | None) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_ED, experts_TS, chosen_TS, scores_TE = ctx.saved_tensors
        grad_TS = torch.zeros_like(chosen_TS) if grad_TS is None else grad_TS
        if grad_TE is None and runs_in_c(x_TD):
            slopes_TS = torch.ops.aten.sigmoid_backward(grad_TS, chosen_TS)
            grad_weight_ED = sparse_outer(slopes_TS, experts_TS, x_TD, len(weight_ED)).to(weight_ED.dtype)
            return sparse_project_back(slopes_TS, experts_TS, weight_ED.float()), grad_weight_ED, None
        grad_TE = torch.zeros_like(scores_TE) if grad_TE is None else grad_TE
        slopes_TE = torch.ops.aten.sigmoid_backward(grad_TE.scatter_add(1, experts_TS, grad_TS), scores_TE)
        return *_logits_backward(slopes_TE, x_TD, weight_ED), None


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
        if self.kernel_fits and (kernels := kernels_for(x_TD)):
            logits_TE = _RouterLogits.apply(x_TD, self.weight)  # type: ignore[no-untyped-call]
            return Routing(*kernels.routed(logits_TE, self.e_score_correction_bias, self.choices, self.scaling))
        experts_TS, weights_TS, scores_TE = _Choice.apply(x_TD, self.weight, self.choose)  # type: ignore[no-untyped-call]
        if self.config.norm_topk_prob:
            weights_TS = weights_TS / (weights_TS.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts_TS, weights_TS * self.scaling, scores_TE)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The experts [T, S] with the largest scores plus bias."""
        if self.config.n_group == 1 and chooses_in_c(scores_TE):
            return choose_experts(scores_TE, self.e_score_correction_bias, self.choices)
        scores_TE = scores_TE + self.e_score_correction_bias
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
        return routed_experts(x_TD, weights_TS, gate_up, down, arrange(experts_TS, len(down))[0], self.keep_gate_up)


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
