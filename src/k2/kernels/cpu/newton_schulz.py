"""Products of Newton-Schulz over batches of small bfloat16 matrices, of which one half is computed.

Letters in shapes: M matrices, S rows and columns of a result, K the summed axis.
"""

import torch
from torch import Tensor

from k2.kernels.cpu import _run, serves
from k2.kernels.cpu.gemm import has_gemm, padded


def serves_symmetric(out_MSS: Tensor, inner: int) -> bool:
    """Whether `symmetric_products` makes these; pairs of values are multiplied at once, so that sides are even."""
    return out_MSS.shape[1] % 2 == inner % 2 == 0 and serves(out_MSS) and has_gemm()


def symmetric_products(
    a_MSK: Tensor, b_MKS: Tensor, out_MSS: Tensor, added_MSS: Tensor | None, *, alpha: float, beta: float
) -> Tensor:
    """out = alpha a b + beta added, all symmetric, rounded once.

    A factor may be a transposed view. `out` is contiguous and none of the others.
    """
    (matrices, side, _), inner, threads = out_MSS.shape, a_MSK.shape[2], torch.get_num_threads()
    turned, own = (not factor.is_contiguous() for factor in (a_MSK, b_MKS))
    lefts, rights = (torch.empty(threads, padded(side), inner, dtype=out_MSS.dtype) for _ in range(2))
    sizes = matrices, side, inner, turned, own, threads
    sums = torch.empty(threads, side, side)
    _run("symmetric_products", a_MSK, b_MKS, added_MSS, out_MSS, lefts, rights, sums, *sizes, alpha, beta)
    return out_MSS
