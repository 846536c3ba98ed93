"""Choice of experts, and rows ordered by expert, on a CPU.

Letters in shapes: T tokens, S choices per token, E experts, N = T S rows.
"""

import torch
from torch import Tensor

from k2.kernels.cpu import _run


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
