"""Products of training between bfloat16 rows and weights, on a CPU with bfloat16 dot products.

Weights may be float32 masters, which are rounded as they are read, or bfloat16; their gradient comes in the type that
is asked for, not rounded on the way.

Letters in shapes: N rows, I inputs, O outputs, A and B columns.
"""

from functools import cache

import torch
from torch import Tensor

from k2.kernels.cpu import _run, spare
from k2.kernels.cpu.build import library

PANEL = 64  # columns of a packed factor in gemm.h
WEIGHTS = torch.float32, torch.bfloat16


@cache
def has_gemm() -> bool:
    """Whether this processor has the dot products, and a library to use them."""
    return bool((found := library()) and found.has_gemm())


def serves_gemm(*weights: Tensor) -> bool:
    """Whether the kernels multiply rows by these; pairs of values are multiplied at once, so that widths are even."""
    for weight in weights:
        if weight.dtype not in WEIGHTS or weight.shape[-1] % 2 or weight.shape[-2] % 2:
            return False
    return has_gemm()


def project(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x times the weight's transpose, [N, O]."""
    x_NI, weight_OI = x_NI.contiguous(), weight_OI.contiguous()
    outputs, inputs = weight_OI.shape
    out_NO = x_NI.new_empty(len(x_NI), outputs)
    _run("project", x_NI, weight_OI, out_NO, panels(inputs, outputs), len(x_NI), inputs, outputs, _wide(weight_OI))
    return out_NO


def log_probabilities(x_NI: Tensor, weight_OI: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability [N] float32 under softmax(x weight^T), and softmax minus its one-hot [N, O]."""
    x_NI, weight_OI, targets_N = x_NI.contiguous(), weight_OI.contiguous(), targets_N.contiguous()
    rows, (outputs, inputs) = len(x_NI), weight_OI.shape
    out_NO, log_probs_N = x_NI.new_empty(rows, outputs), torch.empty(rows, dtype=torch.float32)
    tensors = x_NI, weight_OI, targets_N, out_NO, log_probs_N, panels(inputs, outputs)
    _run("log_probabilities", *tensors, rows, inputs, outputs, _wide(weight_OI))
    return log_probs_N, out_NO


def project_back(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """Gradient by the rows that `project` took, [N, I]."""
    grad_NO, weight_OI = grad_NO.contiguous(), weight_OI.contiguous()
    rows, (outputs, inputs) = len(grad_NO), weight_OI.shape
    out_NI = grad_NO.new_empty(rows, inputs)
    sizes = rows, outputs, inputs, _wide(weight_OI)
    _run("project_back", grad_NO, weight_OI, out_NI, panels(outputs, inputs), *sizes)
    return out_NI


def outer(a_NA: Tensor, b_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b [A, B] in float32 or bfloat16: a weight's gradient."""
    a_NA, b_NB = a_NA.contiguous(), b_NB.contiguous()
    rows, sizes = len(a_NA), (a_NA.shape[1], b_NB.shape[1])
    out_AB = spare.empty(sizes, dtype)
    threads = torch.get_num_threads()
    packed = panels(rows, threads * PANEL), panels(rows, sizes[1])
    _run("outer", a_NA, b_NB, out_AB, *packed, rows, *sizes, _wide(out_AB), threads)
    return out_AB


def panels(summed: int, columns: int) -> Tensor:
    """Memory for a packed factor."""
    return torch.empty(summed + summed % 2, padded(columns), dtype=torch.bfloat16)


def padded(columns: int) -> int:
    """Columns of whole panels."""
    return -(-columns // PANEL) * PANEL


def _wide(weight: Tensor) -> int:
    return int(weight.dtype == torch.float32)
