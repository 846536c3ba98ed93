"""Which implementation of the model's operations runs: torch's, the Triton kernels of `k2.kernels`, or its C kernels.

One choice for the process, like its number of threads. Kernels are imported where they run: a CPU needs no Triton.
"""

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from k2.config.base import Kernels
from k2.kernels import cpu
from k2.kernels.cpu.build import library

HALF = (torch.bfloat16, torch.float16)
"""What the tiles of matrix products are made for: twice as wide operands do not fit."""

_log = logging.getLogger(__name__)
_choice: Kernels = "auto"


def use_kernels(choice: Kernels) -> None:
    """Choose for all that follows; `auto`: Triton for half precision on CUDA, C for bfloat16 on a CPU, torch else."""
    global _choice
    _choice = choice


def kernels_for(x: Tensor, *, elementwise: bool = False) -> Any:
    """`k2.kernels.operations` if Triton is to work on `x`, else None.

    Of `auto`, float32 is left to torch unless the kernel is `elementwise`; float64 is torch's anywhere.
    Where Triton was asked for and there is no GPU, the log says once that torch runs, unless TRITON_INTERPRET=1 has
    kernels interpreted. On a GPU there is no way back: a kernel that is missing or cannot run raises.
    """
    if _choice == "torch" or not (x.is_cuda or _interprets()):
        return None
    wide = x.dtype == torch.float32 and (elementwise or _choice == "triton")
    if not (wide or x.dtype in HALF):
        return None
    from k2.kernels import operations

    return operations


def runs_in_c(x: Tensor) -> bool:
    """Whether `k2.kernels.cpu` is to work on `x`."""
    return _choice == "auto" and cpu.serves(x)


def chooses_in_c(scores: Tensor) -> bool:
    """Whether C is to choose by these scores: tokens by logits, or experts."""
    return _choice == "auto" and scores.dtype == torch.float32 and cpu.is_real(scores) and library() is not None


def orders_in_c(chosen: Tensor) -> bool:
    """Whether C is to order rows by these experts."""
    return _choice == "auto" and cpu.is_real(chosen) and library() is not None


def _interprets() -> bool:
    if _choice == "auto":
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    _warn()
    return False


@cache
def _warn() -> None:
    _log.warning("kernels: triton needs a CUDA GPU, tensors are elsewhere: torch runs instead")
