"""Newton-Schulz of batches of small bfloat16 matrices, each whole in one thread.

Letters in shapes: M matrices, R rows, C columns.
"""

from collections.abc import Iterable
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from k2.kernels.cpu import _run, scratch, serves
from k2.kernels.cpu.gemm import has_gemm

Runs = tuple[tuple[tuple[float, float, float], ...], ...]
"""Runs of one or two iterations, each the polynomial a, b, c of X <- aX + b(XX^T)X + c(XX^T)^2 X; the first has one."""


def serves_newton_schulz(memory: Tensor, shapes: Iterable[tuple[int, int, int]]) -> bool:
    """Whether `newton_schulz` takes these shapes there; pairs of values are multiplied at once: sides are even."""
    return all(side % 2 == 0 for shape in shapes for side in shape[1:]) and serves(memory) and has_gemm()


def newton_schulz(x_MRC: Tensor, runs: Runs, *, tight: bool) -> Tensor:
    """Orthogonalise in place, after a division by the Frobenius norm, or by the Schatten 8-norm if `tight`."""
    matrices, rows, columns = x_MRC.shape
    side, length = min(rows, columns), max(rows, columns)
    memory = scratch("newton_schulz_scratch", side, length)
    sizes = matrices, side, length, rows > columns, len(runs), tight, len(memory)
    _run("newton_schulz", x_MRC, *_tables(runs), memory, *sizes)
    return x_MRC


@cache
def _tables(runs: Runs) -> tuple[Tensor, Tensor]:
    """Coefficients of all iterations, and how many each run has."""
    return torch.tensor(list(chain.from_iterable(runs))), torch.tensor([len(run) for run in runs])
