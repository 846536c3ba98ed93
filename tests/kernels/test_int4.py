"""INT4 kernels in the interpreter: fake quantisation bit for bit, products against float64."""

import pytest
import torch

from k2.kernels.int4 import fake_quantize, int4_product, reference
from k2.quant.int4 import dequantize, pack, quantize


def adversarial() -> torch.Tensor:
    """Groups of zeros, ties, also of the scale, one outlier, subnormal and huge values, either sign of the largest."""
    rows = torch.randn(9, 96)
    rows[0] = 0.0
    rows[1, :32] = torch.arange(-16, 16) / 4
    rows[2] = 1e-42
    rows[3] = 1e30 * rows[3]
    rows[4, 5] = -1e4
    rows[5] = -rows[5].abs()
    rows[6] = 1e-30 * rows[6]
    rows[7, ::16] = 7.5 * (1 + torch.arange(201, 213, 2) * 2**-8)  # scales halfway between two bfloat16 numbers
    return rows


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantisation_is_the_export_bit_for_bit(group_size, dtype):
    weight = adversarial().to(dtype)
    expected = dequantize(*quantize(weight, group_size)).to(dtype)
    assert torch.equal(fake_quantize(weight, group_size), expected)


def test_the_gradient_passes_straight_through():
    weight = torch.randn(2, 3, 64, requires_grad=True)
    grad = torch.randn_like(weight)
    (got,) = torch.autograd.grad(fake_quantize(weight, 32), weight, grad)
    assert torch.equal(got, grad)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group_size"), [(1, 1, 32, 32), (130, 70, 160, 32), (5, 129, 48, 16)]
)
def test_product_with_packed_weights(rows, outputs, inputs, group_size):
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    values, scale = quantize(weight, group_size)
    packed = pack(values)
    expected = reference(x.double(), packed, scale)
    y = int4_product(x, packed, scale)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_no_rows():
    values, scale = quantize(torch.randn(8, 32), 32)
    assert int4_product(torch.empty(0, 32), pack(values), scale).shape == (0, 8)
