"""Choice of experts, rows ordered by expert, and products with a router's sparse gradient, on a CPU.

Letters in shapes: T tokens, S choices per token, E experts, N = T S rows, D width.
"""

import torch
from torch import Tensor

from k2.kernels.cpu import _run
from k2.kernels.cpu.gemm import padded


def router_scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """sigmoid(x weight^T) [T, E] in float32, of bfloat16 tokens and a float32 weight."""
    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    experts, width = weight_ED.shape
    scores_TE = weight_ED.new_empty(len(x_TD), experts)
    columns = weight_ED.new_empty(width, padded(experts))
    _run("router_scores", x_TD, weight_ED, scores_TE, columns, len(x_TD), experts, width)
    return scores_TE


def choose_experts(scores_TE: Tensor, bias_E: Tensor, choices: int) -> Tensor:
    """The experts [T, S] with the largest scores plus bias (both float32), best first, lower numbers among equals."""
    scores_TE, bias_E = scores_TE.contiguous(), bias_E.contiguous()
    chosen_TS = torch.empty(len(scores_TE), choices, dtype=torch.int64)
    _run("choose_experts", scores_TE, bias_E, chosen_TS, *scores_TE.shape, choices)
    return chosen_TS


def order_by_expert(chosen_TS: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The row of each pair of token and choice [T, S], pair [N] and token [N] of each row, and where experts begin.

    Rows of one expert are in the order of pairs; there are E + 1 beginnings.
    """
    chosen_TS = chosen_TS.contiguous()
    slots_TS = torch.empty_like(chosen_TS)
    pairs_N, tokens_N = (chosen_TS.new_empty(chosen_TS.numel()) for _ in range(2))  # tokens outlive pairs
    offsets = chosen_TS.new_empty(experts + 1)
    sizes = chosen_TS.numel(), chosen_TS.shape[1], experts
    _run("order_by_expert", chosen_TS, slots_TS, pairs_N, tokens_N, offsets, *sizes)
    return slots_TS, pairs_N, tokens_N, offsets


def sparse_project_back(values_TS: Tensor, chosen_TS: Tensor, weight_ED: Tensor) -> Tensor:
    """Gradient [T, D], in bfloat16, by the rows of a product whose own gradient is `values_TS` where they were chosen.

    Values and weight are float32.
    """
    values_TS, chosen_TS, weight_ED = values_TS.contiguous(), chosen_TS.contiguous(), weight_ED.contiguous()
    out_TD = weight_ED.new_empty(len(values_TS), weight_ED.shape[1], dtype=torch.bfloat16)
    sizes = *values_TS.shape, weight_ED.shape[1]
    _run("sparse_project_back", values_TS, chosen_TS, weight_ED, out_TD, *sizes)
    return out_TD


def sparse_outer(values_TS: Tensor, chosen_TS: Tensor, x_TD: Tensor, experts: int) -> Tensor:
    """Gradient [E, D] by the weight of that product, in float32; x is bfloat16."""
    values_TS, chosen_TS, x_TD = values_TS.contiguous(), chosen_TS.contiguous(), x_TD.contiguous()
    out_ED = values_TS.new_empty(experts, x_TD.shape[1])
    _run("sparse_outer", values_TS, chosen_TS, x_TD, out_ED, *values_TS.shape, *out_ED.shape)
    return out_ED
