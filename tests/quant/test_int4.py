"""The INT4 format against compressed-tensors, and its own invariants."""

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as reference_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as reference_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from k2.quant.int4 import dequantize, pack, quantize, unpack

ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
int4 = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 9).flatmap(lambda words: arrays("int8", (rows, 8 * words), elements=st.integers(-8, 7)))
)


@given(int4)
@settings(max_examples=60, deadline=None)
def test_packing_equals_compressed_tensors_bit_for_bit(array):
    values = torch.from_numpy(array.copy())
    packed = pack(values)
    assert torch.equal(packed, pack_to_int32(values, 4))
    assert torch.equal(unpack(packed), values)
    assert torch.equal(unpack(packed), unpack_from_int32(packed, 4, values.shape))


def test_the_first_value_lies_in_the_lowest_bits():
    word = pack(torch.tensor([[-8, -7, 0, 7, -8, -8, -8, -8]], dtype=torch.int8)).item()
    assert [(word >> 4 * i) & 15 for i in range(8)] == [0, 1, 8, 15, 0, 0, 0, 0]


def test_stacked_and_transposed_experts_pack_like_each_alone():
    values = torch.randint(-8, 8, (3, 16, 24), dtype=torch.int8).transpose(1, 2)
    assert torch.equal(pack(values), torch.stack([pack_to_int32(v.contiguous(), 4) for v in values]))
    assert torch.equal(unpack(pack(values)), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantisation_follows_the_reference_rule(dtype):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[3, 32:64] = 0
    values, scale = quantize(weight.to(dtype), 32)
    groups = weight.unflatten(-1, (-1, 32))
    reference_scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), ARGS)
    assert torch.equal(scale, reference_scale.to(torch.bfloat16))
    reference = reference_quantize(weight.float(), scale.float(), None, ARGS, dtype=torch.int8)
    assert torch.equal(values, reference)
    assert torch.equal(dequantize(values, scale), reference_dequantize(values, scale, None, ARGS))


@given(st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
@settings(max_examples=40, deadline=None)
def test_error_is_at_most_one_step_and_half_a_step_below_the_clamp(seed, magnitude):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * magnitude
    values, scale = quantize(weight, 32)
    steps = (weight.unflatten(-1, (-1, 32)) / scale.float()[..., None]).flatten(-2)
    error = (values - steps).abs()
    assert values.min() >= -8
    assert values.max() <= 7
    assert error.max() <= 1.0
    assert error[steps < 7.5].max() <= 0.5 + 1e-5


def test_a_group_of_zeros_stays_zero():
    values, scale = quantize(torch.zeros(2, 32), 32)
    assert scale.min() > 0
    assert dequantize(values, scale).eq(0).all()
