"""A gated MLP in training on a CPU with bfloat16 dot products: its products and activation in one go.

Weights may be float32 masters, which are rounded as they are read, or bfloat16.

Letters in shapes: N rows, D hidden, F inner width, G = 2F.
"""

import torch
from torch import Tensor

from k2.kernels.cpu import _run, scratch, spare
from k2.kernels.cpu.gemm import _wide, panels


def gated_mlp(x_ND: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up [N, G], and down(silu(gate) * up) [N, D]."""
    x_ND, gate_up_GD, down_DF = x_ND.contiguous(), gate_up_GD.contiguous(), down_DF.contiguous()
    rows, (hidden, inner) = len(x_ND), down_DF.shape
    gate_up_NG, out_ND = x_ND.new_empty(rows, 2 * inner), torch.empty_like(x_ND)
    packed = panels(hidden, 2 * inner), panels(inner, hidden)
    memory = scratch("gated_mlp_scratch", inner)
    sizes = rows, hidden, inner, _wide(down_DF), len(memory)
    _run("gated_mlp", x_ND, gate_up_GD, down_DF, gate_up_NG, out_ND, *packed, memory, *sizes)
    return gate_up_NG, out_ND


def gated_mlp_backward(
    grad_ND: Tensor, x_ND: Tensor, gate_up_GD: Tensor, down_DF: Tensor, gate_up_NG: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by `x_ND` and both weights; where `gate_up_NG` is None it is computed again."""
    grad_ND, x_ND, gate_up_GD, down_DF = (x.contiguous() for x in (grad_ND, x_ND, gate_up_GD, down_DF))
    kept = None if gate_up_NG is None else gate_up_NG.contiguous()
    rows, (hidden, inner) = len(x_ND), down_DF.shape
    grad_gate_up, grad_down = (spare.empty(weight.shape, weight.dtype) for weight in (gate_up_GD, down_DF))
    grads = torch.empty_like(x_ND), grad_gate_up, grad_down
    again = panels(hidden, 2 * inner) if kept is None else None
    packed = again, panels(2 * inner, hidden), panels(hidden, inner)
    columns = (panels(rows, width) for width in (hidden, hidden, 2 * inner, inner))
    memory = scratch("gated_mlp_scratch", inner)
    sizes = rows, hidden, inner, _wide(down_DF), len(memory)
    tensors = grad_ND, x_ND, gate_up_GD, down_DF, kept, *grads, *packed, *columns
    _run("gated_mlp_backward", *tensors, memory, *sizes)
    return grads
