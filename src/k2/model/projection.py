"""Products of training between rows and weights: C kernels for bfloat16 on a CPU, torch's operators else.

Weights are rounded to the rows' precision when used; their gradient is asked for in the masters' type.

Letters in shapes: N rows, I inputs, O outputs, A and B columns.
"""

import torch
from torch import Tensor

from k2.kernels.cpu import gemm
from k2.model.backend import runs_in_c


def project(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x times the weight's transpose, [N, O]."""
    if _in_c(x_NI, weight_OI):
        return gemm.project(x_NI, weight_OI)
    return x_NI @ weight_OI.to(x_NI.dtype).T


def project_back(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """Gradient by the rows that `project` took, [N, I]."""
    if _in_c(grad_NO, weight_OI):
        return gemm.project_back(grad_NO, weight_OI)
    return grad_NO @ weight_OI.to(grad_NO.dtype)


def outer(a_NA: Tensor, b_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b [A, B], the gradient of a weight of that type."""
    if _in_c(a_NA) and dtype in gemm.WEIGHTS:
        return gemm.outer(a_NA, b_NB, dtype)
    return (a_NA.T @ b_NB).to(dtype)


def _in_c(rows: Tensor, *weights: Tensor) -> bool:
    return runs_in_c(rows) and gemm.serves_gemm(*weights)
