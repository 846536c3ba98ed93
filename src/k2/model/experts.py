"""Routed experts without a GPU: every (token, choice) pair is a row; rows are ordered by expert, none is dropped.

Letters in shapes: T tokens, S choices per token, E experts, N rows, D hidden, F expert hidden, G = 2F, I inputs,
O outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.kernels.cpu.experts import ExpertRows, experts_backward, experts_forward
from k2.kernels.cpu.gemm import serves_gemm
from k2.kernels.cpu.routing import order_by_expert
from k2.model.activations import Keep
from k2.model.backend import orders_in_c, runs_in_c
from k2.model.layers import gated, gated_backward

GROUP_ROWS = 256  # experts pass through the layer together until they have so many rows


def arrange(experts_TS: Tensor, count: int) -> tuple[ExpertRows, Tensor]:
    """Order (token, choice) pairs by expert, those of one expert in token order; and the pair of each row, [N]."""
    if orders_in_c(experts_TS):
        slots_TS, pairs_N, tokens_N, offsets = order_by_expert(experts_TS, count)
        return ExpertRows(slots_TS, tokens_N, offsets), pairs_N
    chosen = experts_TS.flatten()
    pairs_N = chosen.argsort(stable=True)
    slots = torch.empty_like(pairs_N)
    slots[pairs_N] = torch.arange(len(pairs_N), device=pairs_N.device)
    offsets = F.pad(torch.bincount(chosen, minlength=count).cumsum(0), (1, 0))
    return ExpertRows(slots.view_as(experts_TS), pairs_N // experts_TS.shape[1], offsets), pairs_N


class _RoutedExperts(torch.autograd.Function):
    """Every token's weighted sum of its experts' outputs.

    Keeps its inputs and what `keep` leaves of the fused gate and up of every row. Weights are cast when used. Sums over
    a token's rows have a fixed order, where index_add would not.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TS: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, rows: ExpertRows, keep: Keep
    ) -> Tensor:
        ctx.in_c = runs_in_c(x_TD) and serves_gemm(gate_up_EGD, down_EDF)
        gate_up_NG, out_TD = (experts_forward if ctx.in_c else _forward)(x_TD, weights_TS, rows, gate_up_EGD, down_EDF)
        ctx.slots_TS, ctx.offsets = rows.slots_TS, rows.offsets
        ctx.save_for_backward(x_TD, weights_TS, rows.tokens_N, gate_up_EGD, down_EDF, keep(gate_up_NG))
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TS, tokens_N, gate_up_EGD, down_EDF, kept_NG = ctx.saved_tensors
        rows = ExpertRows(ctx.slots_TS, tokens_N, ctx.offsets)
        backward = experts_backward if ctx.in_c else _backward
        return *backward(grad_TD, x_TD, weights_TS, rows, gate_up_EGD, down_EDF, kept_NG), None, None


def routed_experts(
    x_TD: Tensor, weights_TS: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, rows: ExpertRows, keep: Keep
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, [T, D]; what `keep` drops of gate and up is computed again."""
    result: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
        x_TD, weights_TS, gate_up_EGD, down_EDF, rows, keep
    )
    return result


@dataclass(frozen=True)
class _Group:
    """Consecutive experts `experts` with `counts` rows each, which are rows `rows` of all."""

    experts: slice
    rows: slice
    counts: list[int]


def _groups(offsets: Tensor) -> Iterator[_Group]:
    """A few experts at a time, so that their rows stay in cache."""
    counts, expert, row = offsets.diff().tolist(), 0, 0
    for stop in range(1, len(counts) + 1):
        rows = sum(counts[expert:stop])
        if rows >= GROUP_ROWS or stop == len(counts):
            yield _Group(slice(expert, stop), slice(row, row + rows), counts[expert:stop])
            expert, row = stop, row + rows


def _forward(
    x_TD: Tensor, weights_TS: Tensor, rows: ExpertRows, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """`experts_forward` in torch's operators."""
    gate_up_NG = x_TD.new_empty(len(rows.tokens_N), gate_up_EGD.shape[1])
    output_ND = x_TD.new_empty(len(rows.tokens_N), x_TD.shape[1])
    scale_N = _by_row(weights_TS, rows)
    for group in _groups(rows.offsets):
        x_rows, gate_up = x_TD.index_select(0, rows.tokens_N[group.rows]), gate_up_NG[group.rows]
        _multiply(x_rows, gate_up_EGD[group.experts].mT, group.counts, gate_up)
        # A scalar commutes with the down projection, and the inner rows are the narrower ones.
        inner = gated(gate_up, scale_N[group.rows])
        _multiply(inner, down_EDF[group.experts].mT, group.counts, output_ND[group.rows])
    return gate_up_NG, F.embedding_bag(rows.slots_TS, output_ND, mode="sum")


def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TS: Tensor,
    rows: ExpertRows,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    kept_NG: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`experts_backward` in torch's operators."""
    grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
    scale_N, grad_ND = _by_row(weights_TS, rows), x_TD.new_empty(len(rows.tokens_N), x_TD.shape[1])
    grad_scale_N = torch.empty_like(scale_N)
    for group in _groups(rows.offsets):
        part, experts, counts = group.rows, group.experts, group.counts
        grad, x_rows = (tensor.index_select(0, rows.tokens_N[part]) for tensor in (grad_TD, x_TD))
        grad_inner = grad.new_empty(len(grad), down_EDF.shape[2])
        _multiply(grad, down_EDF[experts], counts, grad_inner)
        if kept_NG is None:
            gate_up = grad.new_empty(len(grad), gate_up_EGD.shape[1])
            _multiply(x_rows, gate_up_EGD[experts].mT, counts, gate_up)
        else:
            gate_up = kept_NG[part]
        grad_gate_up, grad_scale_N[part], inner = gated_backward(grad_inner, gate_up, scale_N[part])
        _weight_gradient(grad, inner, counts, grad_down_EDF[experts])
        _weight_gradient(grad_gate_up, x_rows, counts, grad_gate_up_EGD[experts])
        _multiply(grad_gate_up, gate_up_EGD[experts], counts, grad_ND[part])
    grad_weights_TS = grad_scale_N.index_select(0, rows.slots_TS.flatten()).view_as(weights_TS)
    return F.embedding_bag(rows.slots_TS, grad_ND, mode="sum"), grad_weights_TS, grad_gate_up_EGD, grad_down_EDF


def _by_row(weights_TS: Tensor, rows: ExpertRows) -> Tensor:
    """Values of pairs [T, S], in the order of rows."""
    return torch.empty_like(weights_TS).flatten().scatter_(0, rows.slots_TS.flatten(), weights_TS.flatten())


def _multiply(rows: Tensor, weights: Tensor, counts: list[int], result: Tensor) -> None:
    """Expert by expert, its rows [N, I] with its matrix of `weights` [E, I, O], straight into the result [N, O].

    Batched products over blocks padded to the largest expert were slower at every shape measured, because
    routing is never quite balanced.
    """
    parts = rows.split_with_sizes(counts), weights.unbind(), result.split_with_sizes(counts)
    for count, x, weight, out in zip(counts, *parts, strict=True):
        if count:
            torch.mm(x, weight.to(x.dtype), out=out)


def _weight_gradient(grad: Tensor, rows: Tensor, counts: list[int], result: Tensor) -> None:
    """Expert by expert grad^T rows, into the precision of `result` [E, O, I]."""
    parts = grad.split_with_sizes(counts), rows.split_with_sizes(counts), result.unbind()
    for count, g, x, out in zip(counts, *parts, strict=True):
        if not count:
            out.zero_()
        elif out.dtype == x.dtype:
            torch.mm(g.T, x, out=out)
        else:
            out.copy_(g.T @ x)
