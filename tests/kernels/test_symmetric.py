"""Symmetric products and Newton-Schulz in the interpreter against float64 and singular values."""

import pytest
import torch

from k2.kernels.symmetric import newton_schulz, reference, symmetric_product
from k2.optim.schemes import SCHEMES


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 130, 70), (1, 128, 64), (3, 17, 300), (1, 257, 3)], ids=str)
def test_product(shape):
    x = torch.randn(shape)
    add = symmetric_product(x)
    torch.testing.assert_close(add.double(), reference(x.double()), rtol=1e-5, atol=1e-4)
    assert torch.equal(add, add.mT)
    y = symmetric_product(x, add, 2.0315, -4.775)
    torch.testing.assert_close(y.double(), reference(x.double(), add.double(), 2.0315, -4.775), rtol=1e-5, atol=1e-3)
    assert torch.equal(y, y.mT)


@pytest.mark.parametrize("shape", [(2, 20, 48), (1, 140, 33), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_newton_schulz(name, shape):
    matrices = torch.randn(shape)
    matrices[-1] *= 1e-3
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    scheme = SCHEMES[name]
    s = s / torch.linalg.vector_norm(s, ord=8 if scheme.tight else 2, dim=-1, keepdim=True)
    for a, b, c in scheme.polynomials:
        s = a * s + b * s**3 + c * s**5
    expected = (u * s[:, None]) @ v
    torch.testing.assert_close(newton_schulz(matrices, scheme).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zero(name):
    assert newton_schulz(torch.zeros(1, 4, 8), SCHEMES[name]).abs().max() == 0
