"""The layers everything is made of: projection, RMSNorm, gated MLP. Weights are cast to the input's precision.

Norm and activation are written as one operation each: on a CPU a chain of small ones costs as much as a product.

Letters in shapes: N rows, D hidden, F inner width.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.kernels import cpu
from k2.kernels.cpu.gated_mlp import gated_mlp, gated_mlp_backward
from k2.kernels.cpu.gemm import serves_gemm
from k2.model.activations import Call, Keep, keep_it, plain_call
from k2.model.backend import kernels_for, runs_in_c
from k2.model.projection import outer, project, project_back

BLOCK_VALUES = 2**17  # values an activation widens to float32 at once: 512 KiB stay in a core's own cache


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [N, D]; inside of an operation, where autograd does not see it."""
    return x.reshape(-1, x.shape[-1])


def upcast(x: Tensor) -> Tensor:
    """At least float32: the precision of norms, router and losses."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _Projection(torch.autograd.Function):
    """One node instead of a chain of casts, views and products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return project(_rows(x), weight_OI).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x, weight_OI), grad_NO = ctx.saved_tensors, _rows(grad)
        return project_back(grad_NO, weight_OI).view(x.shape), outer(grad_NO, _rows(x), weight_OI.dtype)


class Linear(nn.Module):
    """Projection without bias, weight [out, in]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the precision of `x`."""
        result: Tensor = _Projection.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


def _blocks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of several tensors [N, ...], so many that the first one's stay in cache when widened."""
    size = max(1, BLOCK_VALUES // rows[0].shape[1])
    return zip(*(tensor.split(size) for tensor in rows), strict=True)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_ND, scale_N1 = (cpu.rms_norm if runs_in_c(x) else _rms_norm)(_rows(x), weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale_N1)
        return out_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale_N1 = ctx.saved_tensors
        backward = cpu.rms_norm_backward if runs_in_c(grad) else _rms_norm_backward
        grad_ND, grad_weight_D = backward(_rows(grad), _rows(x), weight_D, scale_N1)
        return grad_ND.view(x.shape), grad_weight_D, None


def _rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    output, scale_N1 = torch.empty_like(x_ND), weight_D.new_empty(len(x_ND), 1)
    for x, scale, out in _blocks(x_ND, scale_N1, output):
        wide = upcast(x)
        torch.linalg.vector_norm(wide, dim=1, keepdim=True, out=scale)
        scale.square_().div_(x.shape[1]).add_(eps).rsqrt_()
        out.copy_((wide * scale).mul_(weight_D))
    return output, scale_N1


def _rms_norm_backward(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, scale_N1: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight_D = torch.empty_like(x_ND), torch.zeros_like(weight_D)
    for x, grad, scale, out in _blocks(x_ND, grad_ND, scale_N1, grad_x):
        x, grad = upcast(x), upcast(grad)
        product = x * grad
        grad_weight_D.addmv_(product.T, scale[:, 0])
        share = torch.mv(product, weight_D)[:, None].mul_(scale**3).div_(-x.shape[1])
        out.copy_((grad * weight_D).mul_(scale).addcmul_(x, share))
    return grad_x, grad_weight_D


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.call: Call = plain_call

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and precision as `x`."""
        result: Tensor = self.call(self._normed, x)
        return result

    def _normed(self, x: Tensor) -> Tensor:
        if kernels := kernels_for(x):
            return cast(Tensor, kernels.rms_norm(x, self.weight, self.eps))
        result: Tensor = _RMSNorm.apply(x, upcast(self.weight), self.eps)  # type: ignore[no-untyped-call]
        return result


def gated(gate_up_NG: Tensor, scale_N: Tensor) -> Tensor:
    """silu(first half) * second half of each row, times the row's scale: [N, 2F] -> [N, F], without gradient."""
    if kernels := kernels_for(gate_up_NG):
        return cast(Tensor, kernels.gated(gate_up_NG, scale_N))
    if runs_in_c(gate_up_NG):
        return cpu.gated(gate_up_NG, scale_N)
    result = gate_up_NG.new_empty(gate_up_NG.shape[0], gate_up_NG.shape[1] // 2)
    for gate_up, scale, out in _blocks(gate_up_NG, scale_N, result):
        gate, up = upcast(gate_up).chunk(2, dim=-1)
        out.copy_(F.silu(gate).mul_(up).mul_(scale[:, None]))
    return result


def gated_backward(grad_NF: Tensor, gate_up_NG: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [N, 2F] and [N] of `gated`, and its output once more, [N, F]."""
    if kernels := kernels_for(gate_up_NG):
        return cast(tuple[Tensor, Tensor, Tensor], kernels.gated_backward(grad_NF, gate_up_NG, scale_N))
    if runs_in_c(gate_up_NG):
        return cpu.gated_backward(grad_NF, gate_up_NG, scale_N)
    grad_gate_up, grad_scale = torch.empty_like(gate_up_NG), torch.empty_like(scale_N)
    output = torch.empty_like(grad_NF)
    for gate_up, grad, scale, *outs in _blocks(gate_up_NG, grad_NF, scale_N, output, grad_gate_up, grad_scale):
        gate, up = upcast(gate_up).chunk(2, dim=-1)
        grad, scale = upcast(grad), scale[:, None]
        active = F.silu(gate)
        product = active * up
        torch.linalg.vecdot(grad, product, out=outs[2])
        outs[0].copy_(product.mul_(scale))
        grad = grad * scale
        grad_gate, grad_up = outs[1].chunk(2, dim=-1)
        grad_up.copy_(active.mul_(grad))
        grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return grad_gate_up, grad_scale, output


class _GatedMLP(torch.autograd.Function):
    """Keeps its input and what `keep` leaves of the fused gate and up; the rest is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up_GD: Tensor, down_DF: Tensor, keep: Keep) -> Tensor:
        ctx.in_c = runs_in_c(x) and serves_gemm(gate_up_GD, down_DF)
        gate_up_NG, out_ND = (gated_mlp if ctx.in_c else _gated_mlp)(_rows(x), gate_up_GD, down_DF)
        ctx.save_for_backward(x, gate_up_GD, down_DF, keep(gate_up_NG))
        return out_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gate_up_GD, down_DF, kept_NG = ctx.saved_tensors
        backward = gated_mlp_backward if ctx.in_c else _gated_mlp_backward
        grad_ND, grad_gate_up, grad_down = backward(_rows(grad), _rows(x), gate_up_GD, down_DF, kept_NG)
        return grad_ND.view(x.shape), grad_gate_up, grad_down, None


def _gated_mlp(x_ND: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    """`gated_mlp` in torch's operators."""
    gate_up_NG = project(x_ND, gate_up_GD)
    return gate_up_NG, project(gated(gate_up_NG, _ones(gate_up_NG)), down_DF)


def _gated_mlp_backward(
    grad_ND: Tensor, x_ND: Tensor, gate_up_GD: Tensor, down_DF: Tensor, kept_NG: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_mlp_backward` in torch's operators."""
    gate_up_NG = project(x_ND, gate_up_GD) if kept_NG is None else kept_NG
    grad_NG, _, inner_NF = gated_backward(project_back(grad_ND, down_DF), gate_up_NG, _ones(gate_up_NG))
    grad_gate_up, grad_down = outer(grad_NG, x_ND, gate_up_GD.dtype), outer(grad_ND, inner_NF, down_DF.dtype)
    return project_back(grad_NG, gate_up_GD), grad_gate_up, grad_down


def _ones(rows: Tensor) -> Tensor:
    """A scale of each row."""
    return torch.ones(len(rows), dtype=upcast(rows[:0]).dtype, device=rows.device)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up fused in one matrix [2F, D]."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * width)
        self.down_proj = Linear(width, hidden)
        self.keep_gate_up: Keep = keep_it

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        weights = self.gate_up_proj.weight, self.down_proj.weight
        result: Tensor = _GatedMLP.apply(x, *weights, self.keep_gate_up)  # type: ignore[no-untyped-call]
        return result
