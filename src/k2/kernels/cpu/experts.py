"""Routed experts in training on a CPU with bfloat16 dot products: everything an expert does in one go.

With hundreds of experts a product has a few dozen rows, and finding and starting a library's kernel costs as much as
its arithmetic. Weights may be float32 masters, which are rounded as they are read, or bfloat16.

Letters in shapes: T tokens, S choices, E experts, N = T S rows ordered by expert, D hidden, F expert hidden, G = 2F.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from k2.kernels.cpu import _run, scratch, spare
from k2.kernels.cpu.gemm import _wide


class ExpertRows(NamedTuple):
    """Rows ordered by expert: `slots_TS` is the row of each (token, choice), `tokens_N` the token of each row.

    Expert e has the rows `offsets[e]` to `offsets[e + 1]`.
    """

    slots_TS: Tensor
    tokens_N: Tensor
    offsets: Tensor


def experts_forward(
    x_TD: Tensor, weights_TS: Tensor, rows: ExpertRows, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """Gate and up of every row [N, G], and each token's sum [T, D] of outputs times its float32 weights."""
    x_TD, weights_TS, gate_up_EGD, down_EDF = (x.contiguous() for x in (x_TD, weights_TS, gate_up_EGD, down_EDF))
    count = len(rows.tokens_N)
    gate_up_NG, out_TD = x_TD.new_empty(count, gate_up_EGD.shape[1]), torch.empty_like(x_TD)
    memory, sizes = _memory(rows, down_EDF, False)
    own = x_TD.new_empty(count, x_TD.shape[1]), weights_TS.new_empty(count)
    tensors = x_TD, weights_TS, *rows, gate_up_EGD, down_EDF, gate_up_NG, out_TD, *own
    _run("experts_forward", *tensors, memory, *weights_TS.shape, *sizes)
    return gate_up_NG, out_TD


def experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TS: Tensor,
    rows: ExpertRows,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    gate_up_NG: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by `x_TD`, `weights_TS` and the experts' matrices.

    `gate_up_NG` is what the forward pass returned; None has it computed again.
    """
    inputs = [x.contiguous() for x in (grad_TD, x_TD, weights_TS)]
    stacked = gate_up_EGD.contiguous(), down_EDF.contiguous()
    kept = None if gate_up_NG is None else gate_up_NG.contiguous()
    grads = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    grad_gate_up, grad_down = (spare.empty(weight.shape, weight.dtype) for weight in stacked)
    memory, sizes = _memory(rows, down_EDF, True)
    count = len(rows.tokens_N)
    own = x_TD.new_empty(count, x_TD.shape[1]), weights_TS.new_empty(count), weights_TS.new_empty(count)
    tensors = *inputs, *rows, *stacked, kept, *grads, grad_gate_up, grad_down, *own
    _run("experts_backward", *tensors, memory, *weights_TS.shape, *sizes)
    return *grads, grad_gate_up, grad_down


def _memory(rows: ExpertRows, down_EDF: Tensor, backward: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Memory of all threads, and the sizes that both kernels take."""
    memory = scratch("experts_scratch", rows.offsets.data_ptr(), *down_EDF.shape, backward)
    return memory, (*down_EDF.shape, _wide(down_EDF), len(memory))
