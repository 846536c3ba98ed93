"""Products and routed experts in C: against float64, whatever the shapes, threads and weights."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from k2.kernels.cpu.experts import ExpertRows, experts_backward, experts_forward
from k2.kernels.cpu.gated_mlp import gated_mlp, gated_mlp_backward
from k2.kernels.cpu.gemm import has_gemm, log_probabilities, outer, project, project_back
from k2.kernels.cpu.newton_schulz import newton_schulz
from k2.kernels.cpu.routing import router_scores
from k2.model.experts import arrange
from k2.model.projection import _in_c
from k2.optim.schemes import SCHEMES

pytestmark = pytest.mark.skipif(not has_gemm(), reason="needs a C compiler and a processor with avx512_bf16")

HALF_STEP = 2**-8
"""Relative error of rounding to bfloat16, once."""
EVEN = st.integers(1, 90).map(lambda half: 2 * half)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found: Tensor, exact: Tensor, *, rel: float = HALF_STEP, abs_: float = 0.0) -> None:
    """`found` is `exact` rounded once, up to float32's error of a sum; `exact` has no rounding inside."""
    assert found.shape == exact.shape
    slack = abs_ + 1e-5 * float(exact.abs().max()) + rel * exact.abs()
    assert ((found.double() - exact).abs() <= slack).all()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 200), inputs=EVEN, outputs=EVEN, wide=st.booleans())
def test_products(rows: int, inputs: int, outputs: int, wide: bool) -> None:
    """Odd numbers of rows, widths that fill no panel, masters and bfloat16 weights."""
    x, grad = bf16(rows, inputs), bf16(rows, outputs, seed=1)
    rounded = bf16(outputs, inputs, seed=2)
    weight = rounded.float() * (1 + 2**-11) if wide else rounded
    assert _in_c(x, weight)
    close(project(x, weight), x.double() @ rounded.double().T)
    close(project_back(grad, weight), grad.double() @ rounded.double())
    exact = grad.double().T @ x.double()
    close(outer(grad, x, torch.float32), exact, rel=1e-6)
    close(outer(grad, x, torch.bfloat16), exact)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 120), inputs=EVEN, outputs=EVEN, wide=st.booleans())
def test_log_probabilities(rows: int, inputs: int, outputs: int, wide: bool) -> None:
    """Logits are rounded to bfloat16 before the softmax, as everywhere; of masters and bfloat16 weights."""
    x, weight = bf16(rows, inputs), bf16(outputs, inputs, seed=1)
    weight = weight.float() * (1 + 2**-11) if wide else weight
    targets = torch.randint(outputs, (rows,), generator=torch.Generator().manual_seed(2))
    exact = project(x, weight).double().log_softmax(-1)
    found, surplus = log_probabilities(x, weight, targets)
    assert (found.double() - exact.gather(1, targets[:, None])[:, 0]).abs().max() <= 1e-5 * exact.abs().max()
    close(surplus, exact.exp() - F.one_hot(targets, outputs), abs_=1e-6)


def test_not_served() -> None:
    x = bf16(3, 8)
    assert not _in_c(x, torch.ones(4, 7))
    assert not _in_c(x, torch.ones(4, 8), torch.ones(4, 3, 8))
    assert not _in_c(x, torch.ones(4, 8, dtype=torch.float16))
    assert not _in_c(x.float(), torch.ones(4, 8))


def case(
    counts: list[int], hidden: int, inner: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], ExpertRows, tuple[Tensor, Tensor]]:
    """Gradient, tokens and weights of their choices, one or a few of experts that have `counts` rows."""
    generator, rows = torch.Generator().manual_seed(3), sum(counts)
    choices = next(choices for choices in (3, 2, 1) if rows % choices == 0)
    numbers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    chosen = numbers[torch.randperm(rows, generator=generator)].view(-1, choices)
    weights = torch.rand(chosen.shape, generator=generator)
    inputs = bf16(len(chosen), hidden, seed=4), bf16(len(chosen), hidden, seed=5), weights
    return inputs, arrange(chosen, len(counts))[0], matrices((len(counts),), hidden, inner, dtype)


def matrices(experts: tuple[int, ...], hidden: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gate and up, and down."""
    shapes = (*experts, 2 * inner, hidden), (*experts, hidden, inner)
    gate_up, down = (bf16(*shape, seed=6 + len(shape)).mul(0.2).to(dtype) for shape in shapes)
    return gate_up, down


def exact_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def exact_experts(x: Tensor, weights: Tensor, rows: ExpertRows, gate_up: Tensor, down: Tensor) -> Tensor:
    outputs = [
        exact_mlp(x[rows.tokens_N[start:stop]], gate_up[expert], down[expert])
        for expert, (start, stop) in enumerate(rows.offsets.unfold(0, 2, 1).tolist())
    ]
    return (torch.cat(outputs)[rows.slots_TS] * weights[..., None]).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "hidden", "inner"),
    [([3, 0, 7, 2], 16, 8), ([129, 40, 0], 72, 22), ([0, 0, 5], 130, 66)],
    ids=["small", "large", "wide"],
)
def test_experts(counts: list[int], hidden: int, inner: int, dtype: torch.dtype) -> None:
    """Outputs and all gradients; experts without rows have zero gradients."""
    (grad, x, weights), rows, stacked = case(counts, hidden, inner, dtype)
    gate_up, output = experts_forward(x, weights, rows, *stacked)
    found = experts_backward(grad, x, weights, rows, *stacked, gate_up)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weights, *stacked)]
    exact = exact_experts(*leaves[:2], rows, *leaves[2:])
    # Every value of a row is rounded three times on its way: bounds are relative to the largest value.
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    for got, value in zip([output, *found], [exact.detach(), *wanted], strict=True):
        assert got.shape == value.shape
        assert (got.double() - value).abs().max() <= 3 * HALF_STEP * value.abs().max()
    for grads in found[2:]:
        assert not any(grads[expert].any() for expert, count in enumerate(counts) if not count)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 200), hidden=EVEN, inner=EVEN, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_gated_mlp(rows: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    """Output and gradients, of some or no whole blocks of rows."""
    x, grad, weights = bf16(rows, hidden), bf16(rows, hidden, seed=1), matrices((), hidden, inner, dtype)
    gate_up, output = gated_mlp(x, *weights)
    found = gated_mlp_backward(grad, x, *weights, gate_up)
    leaves = [tensor.double().requires_grad_() for tensor in (x, *weights)]
    exact = exact_mlp(*leaves)
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    for got, value in zip([output, *found], [exact.detach(), *wanted], strict=True):
        assert got.shape == value.shape
        assert (got.double() - value).abs().max() <= 4 * HALF_STEP * value.abs().max()


def test_gate_and_up_computed_again() -> None:
    (grad, x, weights), rows, stacked = case([9, 0, 4], 32, 12, torch.float32)
    gate_up, _ = experts_forward(x, weights, rows, *stacked)
    kept, again = (experts_backward(grad, x, weights, rows, *stacked, given) for given in (gate_up, None))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    mlp = matrices((), 32, 12, torch.float32)
    gate_up, _ = gated_mlp(x, *mlp)
    apart = torch.cat([gate_up, gate_up], dim=1)[:, : gate_up.shape[1]]
    kept, *others = (gated_mlp_backward(grad, x, *mlp, given) for given in (gate_up, apart, None))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(kept, other, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_threads_change_no_bit(threads: None) -> None:
    (grad, x, weights), rows, stacked = case([200, 31, 0, 77, 5], 64, 96, torch.float32)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        orthogonal = newton_schulz(bf16(7, 66, 40), SCHEMES["polar_express"].runs, tight=True)
        gate_up, output = experts_forward(x, weights, rows, *stacked)
        of_experts = output, *experts_backward(grad, x, weights, rows, *stacked, gate_up)
        mlp = stacked[0][0], stacked[1][0]
        gate_up, output = gated_mlp(x, *mlp)
        of_mlp = output, *gated_mlp_backward(grad, x, *mlp, gate_up)
        products = project(x, mlp[0]), project_back(grad, mlp[1]), outer(grad, x, torch.float32)
        found.append([*of_experts, *of_mlp, *products, router_scores(x, mlp[0][:33].float()), orthogonal])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
