"""Causal attention in C: against float64 with every probability written out, whatever the shapes, mask and threads.

Letters in shapes: B batch, H heads, L length, X query and key width, V value width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2.kernels.cpu.causal import causal_attention, causal_attention_backward, serves_attention
from k2.kernels.cpu.gemm import has_gemm

pytestmark = pytest.mark.skipif(not has_gemm(), reason="needs a C compiler and a processor with avx512_bf16")

HALF_STEP = 2**-8
"""Relative error of rounding to bfloat16, once."""
EVEN = st.integers(1, 50).map(lambda half: 2 * half)


@dataclass(frozen=True)
class Case:
    """Inputs of both passes; documents of random lengths if `masked`."""

    batch: int
    heads: int
    length: int
    width: int
    values: int
    masked: bool

    def inputs(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Queries, keys and values, the output's gradient [B, L, H, V], and the mask."""
        generator = torch.Generator().manual_seed(0)

        def bf16(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=generator).bfloat16()

        heads = [bf16(self.heads, self.length, each) for each in (self.width, self.width, self.values)]
        grad_BLHV, bias_BLL = bf16(self.length, self.heads, self.values), None
        if self.masked:
            documents_BL = torch.randint(2, (self.batch, self.length), generator=generator).cumsum(1)
            apart = documents_BL[:, :, None] != documents_BL[:, None, :]
            bias_BLL = torch.zeros(apart.shape).masked_fill(apart, -torch.inf)
        return heads, grad_BLHV, bias_BLL

    @property
    def scale(self) -> float:
        """So that the largest logits are some units apart."""
        return 1.5 * self.width**-0.5


def found(case: Case) -> list[Tensor]:
    """Output, largest logits and all three gradients, by the kernels."""
    (q, k, v), grad, bias = case.inputs()
    assert serves_attention(q, k, v)
    out, row_max, log_sums = causal_attention(q, k, v, bias, case.scale)
    return [out, row_max, *causal_attention_backward(grad, q, k, v, bias, log_sums, case.scale)]


def exact(case: Case) -> list[Tensor]:
    """The same in float64."""
    heads, grad, bias = case.inputs()
    q, k, v = (tensor.double().requires_grad_() for tensor in heads)
    logits = q @ k.mT * case.scale + torch.full((case.length, case.length), -torch.inf).triu(1)
    logits = logits if bias is None else logits + bias[:, None]
    out = (logits.softmax(-1) @ v).transpose(1, 2)
    return [out.detach(), logits.detach().amax(-1), *torch.autograd.grad(out, (q, k, v), grad.double())]


@settings(max_examples=40, deadline=None)
@given(case=st.builds(Case, st.integers(1, 3), st.integers(1, 3), st.integers(1, 200), EVEN, EVEN, st.booleans()))
@example(Case(1, 1, 1, 2, 2, False))
@example(Case(2, 3, 49, 96, 64, True))
@example(Case(1, 2, 301, 192, 128, False))
def test_attention_and_its_gradients(case: Case) -> None:
    """Lengths of one token, odd ones and of several blocks; widths of less than a panel and of more."""
    out, row_max, *gradients = found(case)
    wanted, logits, *exact_gradients = exact(case)
    assert (row_max - logits).abs().max() <= 1e-5 * (1 + logits.abs().max())
    # Probabilities and slopes are rounded once, results once more: bounds are relative to the largest value. Of one key
    # only, slopes are the rest of a difference.
    for got, value in zip([out, *gradients], [wanted, *exact_gradients], strict=True):
        assert got.shape == value.shape
        assert (got.double() - value).abs().max() <= 2 * HALF_STEP * value.abs().max() + 1e-5


@pytest.fixture
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.parametrize("masked", [False, True])
def test_threads_change_no_bit(threads: None, masked: bool) -> None:
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(found(Case(2, 2, 131, 24, 66, masked)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_no_number_shows_in_the_maximum_of_every_query_that_sees_it(masked: bool) -> None:
    case = Case(1, 2, 100, 16, 8, False)
    (q, k, v), _, _ = case.inputs()
    bias = torch.zeros(1, 100, 100) if masked else None
    k[0, 1, 60, 3] = torch.nan
    _, row_max, _ = causal_attention(q, k, v, bias, case.scale)
    assert not row_max[0, 0].isnan().any()
    assert not row_max[0, 1, :60].isnan().any()
    assert row_max[0, 1, 60:].isnan().all()


def test_not_served() -> None:
    even, odd = torch.ones(1, 1, 5, 4).bfloat16(), torch.ones(1, 1, 5, 3).bfloat16()
    assert serves_attention(even, even, even)
    assert not serves_attention(even, even, odd)
    assert not serves_attention(odd, odd, even)
    assert not serves_attention(even.float(), even.float(), even.float())
    assert not serves_attention(even, even, even.double())
