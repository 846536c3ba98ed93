"""The loss of bfloat16 hidden states and a head of float32 masters, in C: the head is read as it is, and its gradient
is not rounded on the way."""

import pytest
import torch
from torch import Tensor

from k2.kernels.cpu.gemm import has_gemm, log_probabilities
from k2.model.loss import token_log_probs

pytestmark = pytest.mark.skipif(not has_gemm(), reason="needs a C compiler and a processor with avx512_bf16")

TOKENS, HIDDEN, VOCABULARY = 45, 34, 130


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, masters that bfloat16 cannot hold, targets, and the upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16().float() * (1 + 2**-11)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(TOKENS, generator=generator)


def found(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and gradients by hidden states and head."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_probs = token_log_probs(*leaves, targets)
    by_hidden, by_weight = torch.autograd.grad(log_probs, leaves, grad)
    return log_probs.detach(), by_hidden, by_weight


@pytest.mark.parametrize("rows", [TOKENS, 20, 7])
def test_the_gradient_of_masters_is_not_rounded(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed at once and in parts, whose sum is float32's."""
    monkeypatch.setattr("k2.model.loss.KEPT_VALUES", rows * VOCABULARY)
    hidden, weight, targets, grad = case()
    log_probs, _, by_weight = found(hidden, weight, targets, grad)
    exact_log_probs, surplus = log_probabilities(hidden, weight, targets)
    exact = surplus.double().T @ (hidden * -grad[:, None]).bfloat16().double()
    assert torch.equal(log_probs, exact_log_probs)
    assert by_weight.dtype == torch.float32
    assert (by_weight - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert not torch.equal(by_weight, by_weight.bfloat16().float())


def test_masters_are_read_as_the_rounded_head() -> None:
    """Values and gradients by the hidden states are the same bits; the rounded head's own gradient is rounded once."""
    hidden, weight, targets, grad = case()
    masters, rounded = (found(hidden, head, targets, grad) for head in (weight, weight.bfloat16()))
    assert torch.equal(masters[0], rounded[0])
    assert torch.equal(masters[1], rounded[1])
    assert torch.equal(masters[2].bfloat16(), rounded[2])
