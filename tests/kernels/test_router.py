"""The router in the interpreter against float64: choices, weights, permutation and gradient."""

import pytest
import torch

from k2.kernels.experts import arrange
from k2.kernels.router import reference, route

SHAPES = [(1, 1, 1), (1, 8, 8), (21, 13, 3), (40, 64, 8), (17, 6, 1), (0, 4, 2)]


@pytest.mark.parametrize(("tokens", "experts", "choices"), SHAPES)
def test_everything_equals_the_reference(tokens, experts, choices):
    logits = (3 * torch.randn(tokens, experts)).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    bias = 0.2 * torch.randn(experts)
    ours, theirs = route(logits, bias, choices, 2.827), reference(wide, bias.double(), choices, 2.827)
    for name in ("experts_TS", "slots_TS", "source_N", "offsets_E"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.weights_TS.double(), theirs.weights_TS, rtol=1e-5, atol=1e-7)
    grad = torch.randn_like(ours.weights_TS)
    (got,) = torch.autograd.grad(ours.weights_TS, logits, grad)
    (want,) = torch.autograd.grad(theirs.weights_TS, wide, grad.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_equal_scores_choose_the_lower_expert():
    result = route(torch.zeros(5, 7), torch.zeros(7), 3, 1.0)
    assert result.experts_TS.tolist() == [[0, 1, 2]] * 5
    assert result.offsets_E.tolist() == [0, 5, 10, 15, 15, 15, 15, 15]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity, as on a GPU
def test_logits_far_below_zero_and_the_bias_decide():
    logits = torch.full((3, 5), -200.0)
    result = route(logits, torch.tensor([0.0, -1.0, 0.3, 0.2, 0.1]), 2, 1.0)
    assert result.experts_TS.tolist() == [[2, 3]] * 3
    assert result.weights_TS.isfinite().all()


def test_nan_stays_in_bounds_and_is_chosen_last():
    logits = torch.randn(4, 6)
    logits[1] = torch.nan
    logits[2, :5] = torch.nan
    result = route(logits, torch.zeros(6), 2, 1.0)
    assert result.experts_TS[1].tolist() == [0, 1]
    assert result.experts_TS[2].tolist() == [5, 0]
    assert sorted(result.source_N.tolist()) == list(range(8))
    assert result.weights_TS[[0, 3]].isfinite().all()


def test_experts_that_another_rank_chose_are_arranged_alike():
    chosen = route(torch.randn(37, 9), torch.zeros(9), 3, 1.0)
    rows = arrange(chosen.experts_TS.long(), 9)
    assert torch.equal(rows.slots_TS, chosen.slots_TS)
    assert torch.equal(rows.source_N, chosen.source_N)
    assert torch.equal(rows.tokens_N, chosen.source_N // 3)
    assert torch.equal(rows.offsets_E, chosen.offsets_E)
