"""Newton-Schulz against its definition on singular values in float64, and against torch.optim.Muon."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from k2.optim.newton_schulz import COEFFICIENTS, direct_steps, gram_steps, orthogonalize

SHAPES = [(16, 16), (16, 24), (16, 32), (24, 96), (96, 24), (1, 40), (40, 1)]


def reference(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The odd polynomial applied to the singular values, exactly."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def ill_conditioned(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -5, min(rows, columns))) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrix, dtype=torch.float64), reference(matrix), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [torch.randn, ill_conditioned])
def test_bfloat16_is_no_worse_than_torch(shape: tuple[int, int], make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    matrix = make(*shape)
    exact = reference(matrix)
    ours = (orthogonalize(matrix).double() - exact).norm()
    theirs = (_zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7).double() - exact).norm()
    # The Gram form rounds a little more; beside the 18% that five steps leave to exact orthogonality it vanishes.
    assert ours <= theirs + 0.03 * exact.norm()
    assert torch.linalg.svdvals(orthogonalize(matrix).double()).max() < 1.3


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_gram_form_equals_the_direct_one(steps: int) -> None:
    x = torch.nn.functional.normalize(torch.randn(3, 8 * 20, dtype=torch.float64)).view(3, 8, 20)
    torch.testing.assert_close(gram_steps(x, steps), direct_steps(x, steps))


def test_a_batch_is_its_matrices() -> None:
    batch = torch.randn(37, 64, 200)  # several chunks of the cache
    together = orthogonalize(batch, dtype=torch.float32)
    alone = torch.stack([orthogonalize(matrix, dtype=torch.float32) for matrix in batch])
    torch.testing.assert_close(together, alone)


def test_well_conditioned_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(8, 32, 128)).double())
    assert values.min() > 0.6
    assert values.max() < 1.2


def test_zero_matrices_stay_zero() -> None:
    batch = torch.stack([torch.zeros(8, 12), torch.randn(8, 12)])
    result = orthogonalize(batch)
    assert not result[0].any()
    assert result[1].isfinite().all()
