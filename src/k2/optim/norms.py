"""Norms whose bytes do not depend on the number of threads."""

import torch
from torch import Tensor


def stable_norm(tensor: Tensor) -> Tensor:
    """The 2-norm, a float32 scalar, axis by axis: torch splits a reduction to one number between its threads."""
    while tensor.ndim:
        tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return tensor
