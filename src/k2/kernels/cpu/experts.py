"""Routed experts in training on a CPU with bfloat16 dot products: everything an expert does in one go.

With hundreds of experts a product has a few dozen rows, and finding and starting a library's kernel costs as much as
its arithmetic. Weights may be float32 masters, which are rounded as they are read, or bfloat16.

Letters in shapes: T tokens, E experts, N rows ordered by expert, D hidden, F expert hidden, G = 2F.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from k2.kernels.cpu import _run, scratch, spare


class ExpertRows(NamedTuple):
    """Rows ordered by expert: token [N] and float32 weight [N] of each, and where each expert's begin, [E + 1]."""

    tokens_N: Tensor
    scale_N: Tensor
    offsets: Tensor


def experts_forward(x_TD: Tensor, rows: ExpertRows, gate_up_EGD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of every row [N, G], and its expert's output times its weight [N, D]."""
    x_TD, gate_up_EGD, down_EDF = (tensor.contiguous() for tensor in (x_TD, gate_up_EGD, down_EDF))
    gate_up_NG = x_TD.new_empty(len(rows.tokens_N), gate_up_EGD.shape[1])
    output_ND = x_TD.new_empty(len(rows.tokens_N), x_TD.shape[1])
    memory, sizes = _scratch(rows, down_EDF)
    _run("experts_forward", x_TD, *rows, gate_up_EGD, down_EDF, gate_up_NG, output_ND, memory, *sizes)
    return gate_up_NG, output_ND


def experts_backward(
    grad_TD: Tensor, x_TD: Tensor, rows: ExpertRows, gate_up_EGD: Tensor, down_EDF: Tensor, gate_up_NG: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the rows of `x_TD` [N, D], by `scale_N` and by both weights.

    `gate_up_NG` is what the forward pass returned; None has it computed again.
    """
    grad_TD, x_TD, gate_up_EGD, down_EDF = (x.contiguous() for x in (grad_TD, x_TD, gate_up_EGD, down_EDF))
    kept = None if gate_up_NG is None else gate_up_NG.contiguous()
    grads = x_TD.new_empty(len(rows.tokens_N), x_TD.shape[1]), torch.empty_like(rows.scale_N)
    grad_weights = [spare.empty(weight.shape, weight.dtype) for weight in (gate_up_EGD, down_EDF)]
    memory, sizes = _scratch(rows, down_EDF)
    tensors = grad_TD, x_TD, *rows, gate_up_EGD, down_EDF, kept, *grads, *grad_weights
    _run("experts_backward", *tensors, memory, *sizes)
    return *grads, grad_weights[0], grad_weights[1]


def _scratch(rows: ExpertRows, down_EDF: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Memory of all threads, and the sizes that both kernels take."""
    experts, hidden, inner = down_EDF.shape
    most_rows = int(rows.offsets.diff().max())
    memory = scratch("experts_scratch", most_rows, hidden, inner)
    return memory, (experts, most_rows, hidden, inner, int(down_EDF.dtype == torch.float32), len(memory))
