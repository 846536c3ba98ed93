"""Grouped GEMM in the interpreter against float64, one product per expert."""

import logging

import pytest
import torch

from k2.kernels import grouped_gemm as module
from k2.kernels.grouped_gemm import grouped_gemm, reference, rows_product

CASES = {
    "uneven and empty": ([0, 5, 130, 0, 1, 64, 0], 70, 41),
    "one row": ([0, 1], 64, 256),
    "all to one expert": ([0, 0, 129], 65, 257),
    "exact tiles": ([128, 128], 128, 256),
    "no rows at all": ([0, 0, 0], 32, 32),
}


@pytest.mark.parametrize(("counts", "inputs", "outputs"), CASES.values(), ids=CASES.keys())
def test_product_and_both_gradients(counts, inputs, outputs):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x = torch.randn(sum(counts), inputs, requires_grad=True)
    weight = torch.randn(len(counts), outputs, inputs, requires_grad=True)
    grad = torch.randn(sum(counts), outputs)
    y = grouped_gemm(x, weight, offsets)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = reference(wide_x, wide_weight, offsets)
    ours = torch.autograd.grad(y, (x, weight), grad)
    theirs = torch.autograd.grad(expected, (wide_x, wide_weight), grad.double())
    for got, want in zip((y, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    offsets = torch.tensor([0, 3, 3, 40], dtype=torch.int32)
    x, weight = torch.randn(40, 96).to(dtype), torch.randn(3, 24, 96).to(dtype)
    expected = reference(x.double(), weight.double(), offsets)
    y = rows_product(x, weight, offsets)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps + 1e-4).all()


def test_rows_of_one_expert_never_reach_another():
    """A huge row shows in its own expert's outputs and gradient only."""
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    x = torch.randn(4, 16)
    x[1] = 1e30
    y = rows_product(x, torch.ones(2, 8, 16), offsets)
    assert y[2:].abs().max() < 100
    assert module.weight_product(torch.ones(4, 8), x, offsets)[1].abs().max() < 100


def test_elsewhere_the_reference_runs_and_says_so_once(monkeypatch, caplog):
    from k2.kernels import runtime

    monkeypatch.setattr(runtime, "INTERPRETING", False)
    runtime._warn.cache_clear()
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    x, weight = torch.randn(4, 16), torch.randn(2, 8, 16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(grouped_gemm(x, weight, offsets), reference(x, weight, offsets))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "kernel grouped_gemm needs a CUDA GPU, tensors are on cpu"
    ]
