"""Log-probabilities of target tokens without the full logits in memory (the vocabulary has 163,840 rows at K2).

Letters in shapes: T tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.model.layers import upcast

CHUNK_VALUES = 2**20  # logits computed at once: 4 MiB in float32 stay in cache; larger blocks page-fault
KEPT_VALUES = 2**26  # logits kept in compute precision for the backward pass; beyond, they are computed again


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden_TD weight_VD^T) at one target per token, chunk by chunk over tokens."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        tokens, size = hidden_TD.shape[0], max(1, CHUNK_VALUES // weight_VD.shape[0])
        sizes = [min(size, tokens - start) for start in range(0, tokens, size)]
        keep = tokens * weight_VD.shape[0] <= KEPT_VALUES
        kept: list[Tensor] = []
        totals, chosen = [], []
        for hidden, targets in zip(hidden_TD.split_with_sizes(sizes), targets_T.split_with_sizes(sizes), strict=True):
            logits = hidden @ weight_VD.T
            kept += [logits] if keep else []
            wide = upcast(logits)
            totals.append(wide.logsumexp(-1))
            chosen.append(wide.gather(1, targets[:, None])[:, 0])
        total_T = torch.cat(totals)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, total_T, *kept)
        ctx.sizes = sizes
        return torch.cat(chosen) - total_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_TD, weight_VD, targets_T, total_T, *kept = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD)
        pieces = [tensor.split_with_sizes(ctx.sizes) for tensor in (hidden_TD, targets_T, total_T, grad_T, grad_hidden)]
        for i, (hidden, targets, total, grad, out) in enumerate(zip(*pieces, strict=True)):
            logits = kept[i] if kept else hidden @ weight_VD.T
            wide = (upcast(logits) - total[:, None]).exp_().mul_(-grad[:, None])
            wide.scatter_add_(1, targets[:, None], grad[:, None])
            grad_logits = wide.to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=out)
            grad_weight.addmm_(grad_logits.T, hidden)
        return grad_hidden, grad_weight, None


def token_log_probs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Natural-log probability [T] of each target under softmax(hidden weight^T), in at least float32.

    For a temperature divide `hidden_TD` by it.
    """
    result: Tensor = _TokenLogProbs.apply(hidden_TD, weight_VD.to(hidden_TD.dtype), targets_T)  # type: ignore[no-untyped-call]
    return result
