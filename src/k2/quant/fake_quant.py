"""Quantisation-aware training: the forward pass sees the weights that INT4 export will store.

Letters in shapes: E experts, O rows (output), I columns (input).
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.model.backend import kernels_for
from k2.model.moe import WeightTransform
from k2.quant.int4 import dequantize, quantize


class _FakeQuantize(torch.autograd.Function):
    """weight -> dequantize(quantize(weight)); the gradient passes straight through (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group_size: int) -> Tensor:
        return dequantize(*quantize(weight, group_size)).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize(group_size: int) -> WeightTransform:
    """The transform of stacked routed experts [E, O, I] for `Transformer.set_weight_transform`.

    Its output equals, bit for bit, the dequantised weight that an export of the same parameter stores.
    """

    def transform(weight: Tensor) -> Tensor:
        if kernels := kernels_for(weight, elementwise=True):
            return cast(Tensor, kernels.fake_quantize(weight, group_size))
        result: Tensor = _FakeQuantize.apply(weight, group_size)  # type: ignore[no-untyped-call]
        return result

    return transform
