"""MLA flash attention in the interpreter against float64 autograd: ragged, odd, one token, negative logits."""

import pytest
import torch

from k2.kernels.attention import Documents, mla_attention, reference

CASES = {
    "documents across tiles": ([70, 1, 0, 100, 9], 2, (24, 8, 20), 1.0),
    "one token": ([1], 1, (16, 16, 16), 1.0),
    "one long document": ([150], 2, (32, 16, 16), 1.0),
    "a document per token": ([1] * 20, 1, (16, 16, 16), 1.0),
    "two exact tiles": ([128, 128], 1, (16, 16, 32), 1.0),
    "large logits": ([131], 2, (16, 16, 16), 12.0),
}


def draw(tokens, heads, widths, size):
    content, rotary, value = widths
    q = size * torch.randn(tokens, heads, content + rotary)
    kv = torch.randn(tokens, heads, content + value)
    parts = [q[..., :content], q[..., content:], kv[..., :content], torch.randn(tokens, rotary), kv[..., content:]]
    return [part.requires_grad_() for part in parts]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of pairs that are masked afterwards
@pytest.mark.parametrize(("lengths", "heads", "widths", "size"), CASES.values(), ids=CASES.keys())
def test_output_maximum_and_gradients(lengths, heads, widths, size):
    documents = Documents.of(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))
    inputs = draw(sum(lengths), heads, widths, size)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, top = mla_attention(*inputs, documents, 0.3)
    expected, expected_top = reference(*wide, documents, 0.3)
    grad = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(top.double(), expected_top, rtol=1e-5, atol=1e-6)
    for got, want in zip((out, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 * size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Inputs, probabilities and results are rounded; sums are not."""
    documents = Documents.of(torch.tensor([0, 33, 80]), 80)
    inputs = [x.detach().to(dtype).requires_grad_() for x in draw(80, 2, (16, 16, 16), 1.0)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, top = mla_attention(*inputs, documents, 0.3)
    expected, expected_top = reference(*wide, documents, 0.3)
    grad = torch.randn(80, 2, 16).to(dtype)
    ours, theirs = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, wide, grad.double())
    assert top.dtype == torch.float32
    torch.testing.assert_close(top.double(), expected_top, rtol=1e-5, atol=1e-6)
    for got, want in zip((out, *ours), (expected, *theirs), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() / want.norm() < torch.finfo(dtype).eps


def test_a_maximum_may_be_negative():
    """Every logit that is seen is below zero; masked pairs and the padding of tiles must not raise the maximum."""
    ones = torch.ones(40, 1, 16)
    rotary = torch.zeros(40, 1, 16)
    documents = Documents.of(torch.tensor([0, 7, 40]), 40)
    size = torch.linspace(1, 2, 40)[:, None, None]
    out, top = mla_attention(-size * ones, rotary, ones, rotary[:, 0], ones, documents, 1.0)
    torch.testing.assert_close(top, torch.tensor([-16.0]))
    torch.testing.assert_close(out, ones)


def test_masked_pairs_do_not_count():
    """The largest product of all is between a query and a later key, the second largest across documents."""
    q, k = torch.zeros(2, 30, 1, 16)
    q[3], k[9] = 10.0, 10.0
    q[20], k[4] = 5.0, 5.0
    q[25], k[22] = 0.5, 0.5
    documents = Documents.of(torch.tensor([0, 10, 30]), 30)
    rotary = torch.zeros(30, 1, 16)
    _, top = mla_attention(q, rotary, k, rotary[:, 0], torch.ones(30, 1, 16), documents, 0.25)
    assert top.tolist() == [16 * 0.25 * 0.25]
