"""Fake quantisation: what the forward pass sees is what export stores; the gradient passes through."""

import re

import pytest
import torch

from k2.config.model import ModelConfig
from k2.config.quantize import group_problem
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.quant.fake_quant import fake_quantize
from k2.quant.int4 import dequantize, pack, quantize, unpack
from tests.quant.tiny import TINY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_equals_the_exported_weight_bit_for_bit(dtype):
    weight = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    seen = fake_quantize(32)(weight)
    for expert, seen_expert in zip(weight, seen, strict=True):
        values, scale = quantize(expert, 32)
        assert torch.equal(dequantize(unpack(pack(values)), scale), seen_expert.to(torch.bfloat16))
        assert torch.equal(seen_expert.to(torch.bfloat16).to(dtype), seen_expert)


def test_gradient_passes_straight_through():
    weight = torch.randn(2, 8, 32, requires_grad=True)
    upstream = torch.randn(2, 8, 32)
    (fake_quantize(32)(weight) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


def test_only_routed_experts_are_changed():
    model = Transformer(TINY).initialize(0)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))
    plain, _ = model(tokens)
    seen = []

    def spy(weight):
        seen.append(tuple(weight.shape))
        return fake_quantize(32)(weight)

    model.set_weight_transform(spy)
    quantised, _ = model(tokens)
    assert not torch.equal(plain, quantised)
    routed = {t.parameter for t in logical_tensors(TINY) if t.quantized}
    assert sorted(seen) == sorted(tuple(model.state_dict()[name].shape) for name in routed)


def test_a_group_that_does_not_fit_names_the_fields():
    problem = group_problem(TINY, 64)
    assert problem is not None
    assert re.match(r"quantize\.group_size \(64\) .* moe_intermediate_size \(32\)", problem)
    assert group_problem(TINY, 32) is None
    assert group_problem(ModelConfig(), 32) is None
