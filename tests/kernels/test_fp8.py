"""FP8 tiles in the interpreter: every E4M3 number, ties, tails, and torch's own conversion."""

import pytest
import torch

from k2.kernels import fp8


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (33, 200), (2, 257), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference_bit_for_bit(shape, dtype):
    x = (torch.randn(shape) * torch.logspace(-6, 6, shape[1])).to(dtype)
    code, scale = fp8.quantize(x)
    expected_code, expected_scale = fp8.reference_quantize(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(code.view(torch.uint8), expected_code.view(torch.uint8))
    back = fp8.dequantize(code, scale, dtype)
    assert torch.equal(back, fp8.reference_dequantize(code, scale, dtype))


def test_all_numbers_and_the_ties_between_them():
    """448 in every tile makes the scale one, so that the conversion itself is seen."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(500.0))])
    values = torch.cat([numbers, near, -numbers, -near])
    rows = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat([rows, torch.full((len(rows), 1), 448.0)], dim=1)
    code, scale = fp8.quantize(x)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(code.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(fp8.dequantize(code, scale, torch.float32), code.float())


def test_zeros_and_the_error_of_a_round_trip():
    code, scale = fp8.quantize(torch.zeros(2, 130))
    assert torch.equal(fp8.dequantize(code, scale, torch.float32), torch.zeros(2, 130))
    x = torch.randn(4, 256)
    error = (fp8.dequantize(*fp8.quantize(x), torch.float32) - x).abs()
    tops = x.view(4, 2, 128).abs().amax(-1).repeat_interleave(128, dim=1)
    assert (error <= x.abs() / 16 + tops * 2**-10 / 448).all()


def test_not_a_number_stays_so():
    code = torch.tensor([[0x7F, 0xFF, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    back = fp8.dequantize(code, torch.ones(1, 1), torch.float32)
    assert back.isnan().tolist() == [[True, True, False]]
