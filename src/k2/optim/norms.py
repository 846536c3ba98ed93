"""Norms whose bytes do not depend on the number of threads."""

import torch
from torch import Tensor


def stable_norm(tensor: Tensor) -> Tensor:
    """The 2-norm in at least float32, axis by axis: torch splits a reduction to one number between its threads."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    while tensor.ndim:
        tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype)
    return tensor
