"""Newton-Schulz against its definition on singular values in float64, and against torch.optim.Muon."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from k2.optim.newton_schulz import MOONLIGHT, Workspace, orthogonalize

SHAPES = [(16, 16), (16, 24), (16, 32), (24, 96), (96, 24), (1, 40), (40, 1)]


def reference(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The odd polynomial applied to the singular values, exactly."""
    a, b, c = MOONLIGHT[0]
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
    theirs = (_zeropower_via_newtonschulz(matrix, MOONLIGHT[0], 5, 1e-7).double() - exact).norm()
    # The Gram form rounds a little more; beside the 18% that five steps leave to exact orthogonality it vanishes.
    assert ours <= theirs + 0.04 * exact.norm()
    assert torch.linalg.svdvals(orthogonalize(matrix).double()).max() < 1.3


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 12), (12, 8)])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_both_forms_are_the_same_iteration_wide_and_tall(steps: int, shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64)
    results = []
    for through_gram in (True, False):
        workspace = Workspace([(3, 20, 20)], torch.float64, x.device)
        workspace.input(*x.shape).copy_(x)
        workspace._long = through_gram
        results.append(workspace.orthogonalize(MOONLIGHT[:1] * steps).clone())
    torch.testing.assert_close(*results)


def test_different_polynomials_run_in_their_order() -> None:
    polynomials = ((3.0, -3.0, 1.0), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (1.9, -1.2, 0.3))
    for shape in ((6, 20), (6, 8)):
        matrix = torch.randn(*shape, dtype=torch.float64)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.norm()
        for a, b, c in polynomials:
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(orthogonalize(matrix, polynomials, torch.float64), u @ torch.diag(s) @ v)


@pytest.mark.parametrize("shape", [(128, 256), (96, 256), (256, 128), (128, 512)])
def test_orthogonality_error_is_not_above_that_of_torch(shape: tuple[int, int]) -> None:
    batch = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    theirs = torch.stack([_zeropower_via_newtonschulz(matrix, MOONLIGHT[0], 5, 1e-7) for matrix in batch])
    ours, peer = (
        (torch.linalg.svdvals(found.double()) - 1).abs().mean().item() for found in (orthogonalize(batch), theirs)
    )
    assert ours < 1.01 * peer


def test_a_batch_is_its_matrices() -> None:
    batch = torch.randn(137, 64, 200)  # several chunks
    together = orthogonalize(batch, dtype=torch.float32)
    alone = torch.stack([orthogonalize(matrix, dtype=torch.float32) for matrix in batch])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("shape", [(16, 32), (16, 256), (64, 384)])
def test_no_singular_value_explodes_whatever_the_spectrum(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(200, *shape, generator=generator), full_matrices=False)
    side = shape[0]
    for spectrum in (1 / torch.arange(1, side + 1), torch.logspace(0, -3, side), torch.logspace(0, -5, side)):
        assert torch.linalg.svdvals(orthogonalize((u * spectrum) @ v).float()).max() < 1.25


def test_well_conditioned_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(8, 32, 128)).double())
    assert values.min() > 0.6
    assert values.max() < 1.2


def test_zero_matrices_stay_zero() -> None:
    batch = torch.stack([torch.zeros(8, 12), torch.randn(8, 12)])
    result = orthogonalize(batch)
    assert not result[0].any()
    assert result[1].isfinite().all()
