"""Newton-Schulz in C against float64, whatever the shape, the scheme and the size of the values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2.kernels.cpu.gemm import has_gemm
from k2.kernels.cpu.newton_schulz import newton_schulz, serves_newton_schulz
from k2.model.backend import use_kernels
from k2.optim.newton_schulz import orthogonalize
from k2.optim.schemes import SCHEMES, Scheme

pytestmark = pytest.mark.skipif(not has_gemm(), reason="needs a C compiler and a processor with avx512_bf16")


def in_torch(matrices: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    use_kernels("torch")
    try:
        return orthogonalize(matrices, scheme, dtype)
    finally:
        use_kernels("auto")


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@settings(max_examples=40)
@given(
    number=st.integers(1, 3),
    side=st.integers(1, 70).map(lambda half: 2 * half),
    factor=st.sampled_from([1.2, 2.0, 3.1]),
    tall=st.booleans(),
    name=st.sampled_from(sorted(SCHEMES)),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_the_same_polynomials(number: int, side: int, factor: float, tall: bool, name: str, size: float) -> None:
    """Alone, in pairs on the Gram matrix, divided by either norm; widths that fill no tile and no panel."""
    length, scheme = 2 * round(factor * side / 2 + 1), SCHEMES[name]
    shape = (number, length, side) if tall else (number, side, length)
    matrices = (size * torch.randn(shape, generator=torch.Generator().manual_seed(side))).bfloat16()
    exact = in_torch(matrices, scheme, torch.float64)
    found = newton_schulz(matrices.clone(), scheme.runs_for(side, length), tight=scheme.tight)
    assert error(found, exact) < 0.08
    assert torch.linalg.matrix_norm(found.float(), 2).max() < 1.27


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_nearer_than_torch(name: str) -> None:
    matrices, scheme = torch.randn(8, 96, 256, generator=torch.Generator().manual_seed(0)), SCHEMES[name]
    exact = in_torch(matrices, scheme, torch.float64)
    assert error(orthogonalize(matrices, scheme), exact) < error(in_torch(matrices, scheme, torch.bfloat16), exact)


def test_the_optimizer_uses_it() -> None:
    """Larger than one chunk, from float32: not a bit differs from the matrices one by one."""
    scheme = SCHEMES["polar_express"]
    matrices = torch.randn(20, 128, 256, generator=torch.Generator().manual_seed(0))
    one_by_one = [newton_schulz(matrix[None].bfloat16(), scheme.runs, tight=True)[0] for matrix in matrices]
    assert torch.equal(orthogonalize(matrices, scheme), torch.stack(one_by_one))


def test_not_served() -> None:
    memory = torch.ones(60, dtype=torch.bfloat16)
    assert serves_newton_schulz(memory, [(1, 4, 6), (3, 2, 2)])
    assert not serves_newton_schulz(memory, [(1, 4, 6), (1, 4, 7)])
    assert not serves_newton_schulz(memory, [(1, 5, 6)])
    assert not serves_newton_schulz(memory.float(), [(1, 4, 6)])


def test_odd_sides_are_left_to_torch() -> None:
    matrices, scheme = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(0)), SCHEMES["moonlight"]
    assert error(orthogonalize(matrices, scheme), in_torch(matrices, scheme, torch.float64)) < 0.08
