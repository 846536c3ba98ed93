"""SwiGLU and RMSNorm in the interpreter against float64 autograd."""

from math import prod

import pytest
import torch

from k2.kernels import rms_norm, swiglu

SHAPES = [(1, 1), (3, 7), (2, 5, 130), (65, 16), (2, 1300), (0, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_and_its_gradient(shape):
    rows, width = prod(shape[:-1]), shape[-1]
    inputs = (4 * torch.randn(rows, 2 * width)).requires_grad_(), torch.randn(rows, requires_grad=True)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(rows, width)
    y, expected = swiglu.swiglu(*inputs), swiglu.reference(*wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    ours, theirs = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, wide, grad.double())
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(swiglu.gated_backward(grad, *(x.detach() for x in inputs))[2], y.detach())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity, as on a GPU
def test_swiglu_of_extreme_gates():
    x = torch.tensor([[-1e4, -88.0, 0.0, 88.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    y = swiglu.swiglu(x, torch.ones(1))
    torch.testing.assert_close(y, swiglu.reference(x.detach(), torch.ones(1)))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_both_gradients(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    grad = torch.randn(shape)
    y, expected = rms_norm.rms_norm(x, weight, 1e-6), rms_norm.reference(wide_x, wide_weight, 1e-6)
    ours = torch.autograd.grad(y, (x, weight), grad)
    theirs = torch.autograd.grad(expected, (wide_x, wide_weight), grad.double())
    for got, want in zip((y, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_rms_norm_of_zeros_and_huge_values():
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e15), torch.full((40,), -1e-15)]).requires_grad_()
    y = rms_norm.rms_norm(x, torch.ones(40), 1e-6)
    torch.testing.assert_close(y, rms_norm.reference(x.detach(), torch.ones(40), 1e-6))
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_bfloat16_rounds_like_the_reference():
    x, weight = torch.randn(5, 300).bfloat16(), torch.randn(300)
    y = rms_norm.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(y, rms_norm.reference(x, weight, 1e-6), rtol=2**-8, atol=0)
    pair, scale = torch.randn(4, 90).bfloat16(), torch.randn(4)
    torch.testing.assert_close(swiglu.swiglu(pair, scale), swiglu.reference(pair, scale), rtol=2**-8, atol=1e-6)
