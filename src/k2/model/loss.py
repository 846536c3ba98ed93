"""Log-probabilities of target tokens without the full logits in memory (the vocabulary has 163,840 rows at K2).

Letters in shapes: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.kernels import cpu
from k2.kernels.cpu import gemm
from k2.model.backend import kernels_for, runs_in_c
from k2.model.layers import upcast
from k2.model.projection import outer, project_back

PRODUCT_ROWS = 256  # tokens of one matrix product: enough for full speed, and its logits are read while in cache
CHUNK_VALUES = 2**18  # logits widened to float32 at once: 1 MiB stays in a core's own cache
KEPT_VALUES = 2**26  # values kept in compute precision for the backward pass; beyond, they are computed again


def _surplus(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability [T], and softmax minus its one-hot [T, V]: its negative gradient by the logits.

    One exponential per logit: the largest probability is one over the softmax's denominator.
    """
    if runs_in_c(hidden_TD) and gemm.serves_gemm(weight_VD):
        return gemm.log_probabilities(hidden_TD, weight_VD, targets_T)
    weight_VD = weight_VD.to(hidden_TD.dtype)
    surplus_TV = hidden_TD.new_empty(len(hidden_TD), len(weight_VD))
    rows, log_probs = max(1, CHUNK_VALUES // len(weight_VD)), []
    for hidden, targets, product in _split(PRODUCT_ROWS, hidden_TD, targets_T[:, None], surplus_TV):
        torch.mm(hidden, weight_VD.T, out=product)
        if runs_in_c(product):
            log_probs.append(cpu.surplus(product, targets))
            continue
        for logits, targets_T1 in _split(rows, product, targets):
            wide = upcast(logits)
            chosen_T1, largest_T1 = wide.gather(1, targets_T1), wide.amax(1, keepdim=True)
            probabilities = wide.softmax(1)
            log_probs.append((chosen_T1 - largest_T1 + probabilities.amax(1, keepdim=True).log_())[:, 0])
            logits.copy_(probabilities.scatter_add_(1, targets_T1, -torch.ones_like(chosen_T1)))
    return torch.cat(log_probs), surplus_TV


def _split(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)  # type: ignore[no-untyped-call]


def _scale_rows(rows_TD: Tensor, scale_T: Tensor, out_TD: Tensor) -> Tensor:
    """Each row times its factor, into `out_TD`."""
    if runs_in_c(rows_TD):
        return cpu.scale_rows(rows_TD, scale_T, out_TD)
    return torch.mul(rows_TD, scale_T[:, None], out=out_TD)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden_TD weight_VD^T) at one target per token, block by block over tokens."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        ctx.rows = max(1, KEPT_VALUES // len(weight_VD))
        if len(hidden_TD) <= ctx.rows:
            log_probs_T, *kept = _surplus(hidden_TD, weight_VD, targets_T)
        else:
            parts = _split(ctx.rows, hidden_TD, targets_T)
            log_probs_T, kept = torch.cat([_surplus(h, weight_VD, t)[0] for h, t in parts]), []
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, *kept)
        return log_probs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_TD, weight_VD, targets_T, *kept = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden_TD), None
        for hidden, targets, scale_T, out in _split(ctx.rows, hidden_TD, targets_T, -grad_T, grad_hidden):
            surplus = kept[0] if kept else _surplus(hidden, weight_VD, targets)[1]
            # The upstream gradient scales whole rows, so it is multiplied to the narrow side of both products.
            _scale_rows(project_back(surplus, weight_VD), scale_T, out)
            term = outer(surplus, _scale_rows(hidden, scale_T, torch.empty_like(hidden)), weight_VD.dtype)
            del surplus  # before the next rows'
            grad_weight = term if grad_weight is None else upcast(grad_weight).add_(term)
        assert grad_weight is not None  # for the type: there is at least one token
        return grad_hidden, grad_weight.to(weight_VD.dtype), None


def token_log_probs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Natural-log probability [T] of each target under softmax(hidden weight^T), in at least float32.

    For a temperature divide `hidden_TD` by it.
    """
    if kernels := kernels_for(hidden_TD):
        return cast(Tensor, kernels.token_log_probs(hidden_TD, weight_VD.to(hidden_TD.dtype), targets_T))
    result: Tensor = _TokenLogProbs.apply(hidden_TD, weight_VD, targets_T)  # type: ignore[no-untyped-call]
    return result
