"""Fused linear and cross-entropy in the interpreter against float64 autograd."""

import pytest
import torch

from k2.kernels import linear_cross_entropy as module
from k2.kernels.linear_cross_entropy import linear_cross_entropy, reference


@pytest.mark.parametrize(("tokens", "vocabulary", "hidden"), [(1, 1, 1), (130, 257, 70), (5, 600, 64), (0, 9, 4)])
def test_loss_and_both_gradients(tokens, vocabulary, hidden, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_VALUES", 64 * vocabulary)
    x = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    target = torch.randint(vocabulary, (tokens,))
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    grad = torch.randn(tokens)
    loss, expected = linear_cross_entropy(x, weight, target), reference(wide_x, wide_weight, target)
    ours = torch.autograd.grad(loss, (x, weight), grad)
    theirs = torch.autograd.grad(expected, (wide_x, wide_weight), grad.double())
    for got, want in zip((loss, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_bfloat16():
    x, weight = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((20, 64), (300, 64)))
    target = torch.randint(300, (20,))
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss, expected = linear_cross_entropy(x, weight, target), reference(wide_x, wide_weight, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(loss.sum(), (x, weight)),
        torch.autograd.grad(expected.sum(), (wide_x, wide_weight)),
    )
    for got, want in zip(ours, theirs, strict=True):
        assert (got.double() - want).norm() / want.norm() < torch.finfo(torch.bfloat16).eps


def test_all_logits_far_below_zero():
    """Columns beyond the vocabulary must not count as zeros, which would win here."""
    x, weight = torch.full((3, 16), 5.0), torch.full((300, 16), -5.0)
    weight[7] += 0.01
    target = torch.tensor([7, 0, 299])
    loss = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(loss.double(), reference(x.double(), weight.double(), target), rtol=1e-5, atol=1e-5)
