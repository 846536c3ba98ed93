"""The MLPs of a decoding step in torch's operators: experts in the form that suits the number of tokens.

Letters in shapes: T tokens, D hidden, E experts, S choices per token, F expert hidden, G = 2F, P (token, expert)
pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from k2.model.folding import expert_tables
from k2.model.layers import GatedMLP
from k2.model.moe import MixtureOfExperts
from k2.model.products import ExpertProducts, Product, sums

FEW_TOKENS = 16  # up to here a sum of rows for each pair is fastest


class DenseMLP:
    """down(silu(gate) * up), added to the residual stream."""

    def __init__(self, mlp: GatedMLP, gain_D: Tensor, dtype: torch.dtype) -> None:
        self.gate_up = Product((mlp.gate_up_proj.weight.data * gain_D).to(dtype))
        self.down = Product(mlp.down_proj.weight.data.to(dtype))

    def __call__(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        """Add the output for `normed_TD` to `x_TD`."""
        return x_TD.add_(self.down(_gated(self.gate_up(normed_TD))))


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class Mixture:
    """Routed and shared experts.

    Pairs of a token and an expert are ordered by expert, so that an expert is read once, and one that nobody chose
    is not touched.
    """

    def __init__(self, mlp: MixtureOfExperts, gain_D: Tensor, dtype: torch.dtype) -> None:
        self.router = _Router(mlp, gain_D)
        self.shared = None if mlp.shared_experts is None else DenseMLP(mlp.shared_experts, gain_D, dtype)
        self.routed = len(mlp.experts.down_proj)
        gate_up_EGD, down_EDF = expert_tables(mlp, gain_D)
        self.gate_up = ExpertProducts(gate_up_EGD.mT.to(dtype).contiguous())
        self.down = ExpertProducts(down_EDF.mT.to(dtype).contiguous())
        self.few_tokens = FEW_TOKENS if sums(self.down.table_EIO) else 0
        self.shared_1S = torch.arange(self.routed, len(down_EDF), device=down_EDF.device)[None]
        self.ones_1S = torch.ones_like(self.shared_1S, dtype=dtype)

    def __call__(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        """Add the output for `normed_TD` to `x_TD`."""
        experts_TS, weights_TS = self.router(normed_TD)
        if len(normed_TD) <= self.few_tokens:
            return x_TD.add_(self._few(normed_TD, experts_TS, weights_TS))
        x_TD.add_(self._segmented(normed_TD, experts_TS, weights_TS))
        return x_TD if self.shared is None else self.shared(x_TD, normed_TD)

    def _few(self, normed_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor) -> Tensor:
        """A shared expert is one that every token chooses with weight one."""
        tokens = len(normed_TD)
        experts_TS = torch.cat([experts_TS, self.shared_1S.expand(tokens, -1)], 1)
        weights_TS = torch.cat([weights_TS, self.ones_1S.expand(tokens, -1)], 1)
        if tokens == 1:
            inner_PF = _gated(self.gate_up.sums(experts_TS[0], normed_TD.repeat(experts_TS.shape[1], 1)))
            return self.down.sum(experts_TS[0], inner_PF.mul_(weights_TS.T))
        chosen_P, order_P = experts_TS.view(-1).sort(stable=True)
        rows_PD = normed_TD.index_select(0, order_P // experts_TS.shape[1])
        outputs_PD = self.down.sums(chosen_P, _gated(self.gate_up.sums(chosen_P, rows_PD)))
        return _mix(order_P, outputs_PD, weights_TS)

    def _segmented(self, normed_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor) -> Tensor:
        chosen_P, order_P = experts_TS.view(-1).sort(stable=True)
        counts = torch.bincount(chosen_P, minlength=self.routed).tolist()
        rows_PD = normed_TD.index_select(0, order_P // experts_TS.shape[1])
        outputs_PD = self.down.segments(counts, _gated(self.gate_up.segments(counts, rows_PD)))
        return _mix(order_P, outputs_PD, weights_TS)


def _mix(order_P: Tensor, outputs_PD: Tensor, weights_TS: Tensor) -> Tensor:
    """Weighted sum of each token's outputs, which are ordered by expert."""
    places_TS = order_P.argsort().view_as(weights_TS)
    return F.embedding_bag(places_TS, outputs_PD, mode="sum", per_sample_weights=weights_TS)


class _Router:
    """The model's router in few operators."""

    def __init__(self, mlp: MixtureOfExperts, gain_D: Tensor) -> None:
        gate = mlp.gate
        self.choose = gate.choose
        self.weight_DE = (gate.weight.data * gain_D).T.to(gain_D.dtype).contiguous()
        self.scaling, self.normed = gate.scaling, gate.config.norm_topk_prob
        choices = gate.config.num_experts_per_tok
        self.sums_SS = self.weight_DE.new_full((choices, choices), 1.0 / gate.scaling)
        self.floor = self.weight_DE.new_tensor(1e-20 / gate.scaling)

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts [T, S] and their weights in the precision of `x_TD`."""
        scores_TE = torch.mm(x_TD.to(self.weight_DE.dtype), self.weight_DE).sigmoid_()
        experts_TS = self.choose(scores_TE)
        weights_TS = scores_TE.gather(1, experts_TS)
        if self.normed:
            weights_TS /= torch.addmm(self.floor, weights_TS, self.sums_SS)
        else:
            weights_TS *= self.scaling
        return experts_TS, weights_TS.to(x_TD.dtype)
