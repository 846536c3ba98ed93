"""Newton-Schulz against its definition on singular values in float64, and against torch.optim.Muon."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.optim._muon import _zeropower_via_newtonschulz

from k2.optim.newton_schulz import orthogonalize
from k2.optim.schemes import SCHEMES, Scheme

MOONLIGHT, POLAR = SCHEMES["moonlight"], SCHEMES["polar_express"]
FIXED = MOONLIGHT.polynomials[0]
SHAPES = [(16, 16), (16, 24), (16, 32), (24, 96), (96, 24), (1, 40), (40, 1)]


def reference(matrix: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The odd polynomials applied to the singular values, exactly."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s, ord=8 if scheme.tight else 2)
    for a, b, c in scheme.polynomials:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def peer(batch: torch.Tensor) -> torch.Tensor:
    """What torch.optim.Muon makes of each matrix."""
    return torch.stack([_zeropower_via_newtonschulz(matrix, FIXED, 5, 1e-7) for matrix in batch])


def error(result: torch.Tensor) -> float:
    """Mean distance of singular values from one."""
    return float((torch.linalg.svdvals(result.double()) - 1).abs().mean())


def ill_conditioned(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -5, min(rows, columns))) @ v


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_polynomials_of_singular_values(shape: tuple[int, int], scheme: Scheme) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    torch.testing.assert_close(
        orthogonalize(matrix, scheme, torch.float64), reference(matrix, scheme), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [torch.randn, ill_conditioned])
def test_the_published_iterations_are_those_of_torch(shape: tuple[int, int], make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    matrix = make(*shape)
    exact = reference(matrix, MOONLIGHT)
    ours = (orthogonalize(matrix, MOONLIGHT).double() - exact).norm()
    theirs = (peer(matrix[None])[0].double() - exact).norm()
    # Rounding differs in places; beside the 18% that five steps leave to exact orthogonality it vanishes.
    assert ours <= theirs + 0.04 * exact.norm()


def test_pairs_on_the_gram_matrix_are_the_same_iterations_wide_and_tall() -> None:
    for scheme in SCHEMES.values():
        alone = Scheme(tuple((polynomial,) for polynomial in scheme.polynomials), scheme.tight)
        for shape in ((3, 8, 20), (3, 20, 8), (3, 8, 12)):
            x = torch.randn(*shape, dtype=torch.float64)
            torch.testing.assert_close(orthogonalize(x, scheme, x.dtype), orthogonalize(x, alone, x.dtype))


def best_quintic(low: float, high: float) -> NDArray[np.float64]:
    """a, b, c of the odd quintic nearest to one on [low, high], by Remez's exchange, and its error."""
    grid = np.linspace(low, high, 200_001)
    points = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(4) / 3)
    for _ in range(20):
        system = np.stack([points, points**3, points**5, (-1.0) ** np.arange(4)], axis=1)
        solution: NDArray[np.float64] = np.linalg.solve(system, np.ones(4))
        error = grid * (solution[0] + solution[1] * grid**2 + solution[2] * grid**4) - 1
        runs = np.split(np.arange(len(grid)), np.flatnonzero(np.diff(np.sign(error))) + 1)
        points = grid[[run[np.abs(error[run]).argmax()] for run in runs]]
    return solution


def test_the_polynomials_are_the_best_approximations() -> None:
    low, high = 1 / 290, 1.0
    for polynomial, margin in zip(POLAR.polynomials, (1.01, 1.04, 1.02, 1.01), strict=True):
        end = high * margin
        a, b, c, error = best_quintic(max(low, 0.024 * end), end)
        error = abs(error)
        low, high = min(1 - error, a * low + b * low**3 + c * low**5), 1 + error
        middle = (low + high) / 2
        assert polynomial == pytest.approx((a / middle, b / middle, c / middle), abs=2e-3)
        low, high = low / middle, high / middle
    assert (low, high) == pytest.approx((0.81, 1.19), abs=5e-3)


SPECTRA = {
    "random": lambda side: torch.ones(side),
    "a decay of 1e-2": lambda side: torch.logspace(0, -2, side),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(128, 256), (96, 256), (256, 128), (16, 256), (64, 64), (256, 1024)])
def test_orthogonality_error_is_below_that_of_torch(shape: tuple[int, int], spectrum: str) -> None:
    random = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(random, full_matrices=False)
    batch = (u * (s * SPECTRA[spectrum](min(shape)))[:, None]) @ v
    assert error(orthogonalize(batch, POLAR)) < error(peer(batch))


def test_a_batch_is_its_matrices() -> None:
    batch = torch.randn(137, 64, 200)  # several chunks
    together = orthogonalize(batch, POLAR, torch.float32)
    alone = torch.stack([orthogonalize(matrix, POLAR, torch.float32) for matrix in batch])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(16, 32), (16, 256), (64, 384), (48, 64)])
def test_no_singular_value_explodes_whatever_the_spectrum(shape: tuple[int, int], scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(200, *shape, generator=generator), full_matrices=False)
    side = shape[0]
    one_large = torch.full((side,), 1e-2).index_fill(0, torch.tensor([0]), 1.0)
    for spectrum in (
        1 / torch.arange(1, side + 1),
        torch.logspace(0, -3, side),
        torch.logspace(0, -5, side),
        one_large,
    ):
        for size in (1e-6, 1e6):
            assert torch.linalg.svdvals(orthogonalize((u * spectrum * size) @ v, scheme).float()).max() < 1.25


@pytest.mark.parametrize(("name", "low", "high"), [("moonlight", 0.6, 1.2), ("polar_express", 0.75, 1.22)])
def test_well_conditioned_updates_have_singular_values_near_one(name: str, low: float, high: float) -> None:
    matrices = torch.randn(8, 32, 128, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, SCHEMES[name]).double())
    assert values.min() > low
    assert values.max() < high


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_zero_matrices_stay_zero(scheme: Scheme) -> None:
    batch = torch.stack([torch.zeros(8, 12), torch.randn(8, 12)])
    result = orthogonalize(batch, scheme)
    assert not result[0].any()
    assert result[1].isfinite().all()
