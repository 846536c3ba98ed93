"""Initial weights. Every logical tensor has a generator of its own, so that whatever part of a model a rank holds, it
draws the values that one process would, and draws no others."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from k2.model.layout import LogicalTensor


@torch.no_grad()
def draw(state: Mapping[str, Tensor], layout: Iterable[LogicalTensor], seed: int, std: float) -> None:
    """Fill what there is of a model: matrices from N(0, std^2), norms with one and selection biases with zero.

    Args:
        state: parameters and buffers by name, any part of the model's.
        layout: the tensors, as they lie in there; those of other parameters are left out.
    """
    for tensor in layout:
        if tensor.parameter not in state:
            continue
        view = tensor.of(state[tensor.parameter])
        if len(tensor.shape) == 1:
            view.fill_(0.0 if tensor.group == "none" else 1.0)
        else:
            # In float32 on the CPU wherever and however wide the weight is: the values are the same.
            view.copy_(torch.empty(tensor.shape).normal_(std=std, generator=_generator(seed, tensor.name)))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
