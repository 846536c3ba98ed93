"""Routing in C: choice of experts and order of rows, exactly as torch has them, and products with few columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from k2.config.model import ModelConfig
from k2.kernels.cpu.build import library
from k2.kernels.cpu.experts import ExpertRows
from k2.kernels.cpu.routing import choose_experts, router_scores, sparse_outer, sparse_project_back
from k2.model.backend import use_kernels
from k2.model.experts import arrange
from k2.model.moe import Router

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C compiler")
SIZES = {"tokens": st.integers(1, 40), "experts": st.integers(1, 70), "choices": st.integers(1, 8)}


@given(**SIZES)
def test_the_best_experts_come_first(tokens: int, experts: int, choices: int) -> None:
    choices, generator = min(choices, experts), torch.Generator().manual_seed(tokens)
    scores_TE = torch.rand(tokens, experts, generator=generator)
    bias_E = torch.randn(experts, generator=generator)
    expected = (scores_TE + bias_E).sort(dim=-1, descending=True, stable=True).indices[:, :choices]
    assert torch.equal(choose_experts(scores_TE, bias_E, choices), expected)


def test_lower_numbers_come_first_among_equals() -> None:
    scores_TE = torch.zeros(3, 40)
    scores_TE[:, 35] = scores_TE[:, 17] = 1.0
    assert choose_experts(scores_TE, torch.zeros(40), 4).tolist() == [[17, 35, 0, 1]] * 3


def test_no_number_is_no_crash() -> None:
    """A step with such scores is skipped later, for its gradient."""
    chosen_TS = choose_experts(torch.full((2, 20), torch.nan), torch.zeros(20), 3)
    assert ((chosen_TS >= 0) & (chosen_TS < 20)).all()


@given(**SIZES)
def test_rows_are_ordered_by_expert(tokens: int, experts: int, choices: int) -> None:
    chosen_TS = torch.randint(experts, (tokens, choices), generator=torch.Generator().manual_seed(tokens))
    found = arrange(chosen_TS, experts)
    use_kernels("torch")
    try:
        expected = arrange(chosen_TS, experts)
    finally:
        use_kernels("auto")
    assert _parts(found) == _parts(expected)


@given(tokens=SIZES["tokens"], experts=st.integers(1, 150), width=st.integers(1, 150))
def test_scores_of_a_router(tokens: int, experts: int, width: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, width, generator=generator).bfloat16()
    weight_ED = torch.randn(experts, width, generator=generator)
    exact_TE = (x_TD.double() @ weight_ED.double().T).sigmoid()
    assert (router_scores(x_TD, weight_ED) - exact_TE).abs().max() <= 1e-5


@given(**SIZES, width=st.integers(1, 150))
def test_products_with_a_sparse_matrix(tokens: int, experts: int, choices: int, width: int) -> None:
    choices, generator = min(choices, experts), torch.Generator().manual_seed(tokens)
    chosen_TS = torch.rand(tokens, experts, generator=generator).topk(choices).indices
    values_TS = torch.randn(tokens, choices, generator=generator)
    weight_ED, x_TD = torch.randn(experts, width, generator=generator), torch.randn(tokens, width).bfloat16()
    whole_TE = torch.zeros(tokens, experts).double().scatter_(1, chosen_TS, values_TS.double())
    back_TD, outer_ED = whole_TE @ weight_ED.double(), whole_TE.T @ x_TD.double()
    assert ((sparse_project_back(values_TS, chosen_TS, weight_ED) - back_TD).abs() <= back_TD.abs() / 256 + 1e-5).all()
    assert ((sparse_outer(values_TS, chosen_TS, x_TD, experts) - outer_ED).abs() <= 1e-5 * tokens).all()


@pytest.mark.parametrize("asked", [(True, False), (True, True), (False, True)], ids=["choice", "both", "balance"])
def test_the_router_has_the_same_gradients_in_c(asked: tuple[bool, bool]) -> None:
    """Of the weights of what was chosen, of all scores, or of both."""
    router = Router(ModelConfig(n_routed_experts=24, num_experts_per_tok=3, hidden_size=20))
    x_TD, sides = torch.randn(30, 20).bfloat16().requires_grad_(), []
    with torch.no_grad():
        router.weight.normal_()
    for choice in ("auto", "torch"):
        use_kernels(choice)  # type: ignore[arg-type]
        routing = router(x_TD)
        sums = [(tensor.double() ** 2).sum() for tensor in (routing.weights_TS, routing.scores_TE)]
        loss = sum(each for each, wanted in zip(sums, asked, strict=True) if wanted)
        sides.append([routing.experts_TS, *torch.autograd.grad(loss, [x_TD, router.weight])])
    use_kernels("auto")
    for found, expected in zip(*sides, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)


def _parts(found: tuple[ExpertRows, Tensor]) -> list[object]:
    return [tensor.tolist() for tensor in (*found[0], found[1])]
