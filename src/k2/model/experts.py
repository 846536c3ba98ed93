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


@dataclass(frozen=True)
class Blocks:
    """Rows ordered by expert: `slots_TS` is the row of each (token, choice), `source_N` the pair of each row.

    `tokens_N` is the token of each row; expert e has the rows `offsets[e]` to `offsets[e + 1]`.
    """

    slots_TS: Tensor
    source_N: Tensor
    tokens_N: Tensor
    offsets: Tensor


def arrange(experts_TS: Tensor, count: int) -> Blocks:
    """Order (token, choice) pairs by expert, pairs of one expert in token order."""
    if orders_in_c(experts_TS):
        return Blocks(*order_by_expert(experts_TS, count))
    chosen = experts_TS.flatten()
    order = chosen.argsort(stable=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    offsets = F.pad(torch.bincount(chosen, minlength=count).cumsum(0), (1, 0))
    return Blocks(slots.view_as(experts_TS), order, order // experts_TS.shape[1], offsets)


class _RoutedExperts(torch.autograd.Function):
    """Every token's weighted sum of its experts' outputs.

    Keeps its inputs and what `keep` leaves of the fused gate and up of every row. Weights are cast when used. Sums over
    a token's rows have a fixed order, where index_add would not.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TS: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, blocks: Blocks, keep: Keep
    ) -> Tensor:
        rows = ExpertRows(blocks.tokens_N, weights_TS.flatten().index_select(0, blocks.source_N), blocks.offsets)
        ctx.in_c = runs_in_c(x_TD) and serves_gemm(gate_up_EGD, down_EDF)
        gate_up_NG, output_ND = (experts_forward if ctx.in_c else _forward)(x_TD, rows, gate_up_EGD, down_EDF)
        ctx.offsets, ctx.slots_TS = blocks.offsets, blocks.slots_TS
        ctx.save_for_backward(x_TD, rows.tokens_N, rows.scale_N, gate_up_EGD, down_EDF, keep(gate_up_NG))
        return F.embedding_bag(blocks.slots_TS, output_ND, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, tokens_N, scale_N, gate_up_EGD, down_EDF, kept_NG = ctx.saved_tensors
        rows = ExpertRows(tokens_N, scale_N, ctx.offsets)
        backward = experts_backward if ctx.in_c else _backward
        grad_ND, grad_scale_N, *grads = backward(grad_TD, x_TD, rows, gate_up_EGD, down_EDF, kept_NG)
        grad_x_TD = F.embedding_bag(ctx.slots_TS, grad_ND, mode="sum")
        grad_weights_TS = grad_scale_N.index_select(0, ctx.slots_TS.flatten()).view_as(ctx.slots_TS)
        return grad_x_TD, grad_weights_TS, *grads, None, None


def routed_experts(
    x_TD: Tensor, weights_TS: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, blocks: Blocks, keep: Keep
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, [T, D]; what `keep` drops of gate and up is computed again."""
    result: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
        x_TD, weights_TS, gate_up_EGD, down_EDF, blocks, keep
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


def _forward(x_TD: Tensor, rows: ExpertRows, gate_up_EGD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """`experts_forward` in torch's operators."""
    gate_up_NG = x_TD.new_empty(len(rows.tokens_N), gate_up_EGD.shape[1])
    output_ND = x_TD.new_empty(len(rows.tokens_N), x_TD.shape[1])
    for group in _groups(rows.offsets):
        x_rows, gate_up = x_TD.index_select(0, rows.tokens_N[group.rows]), gate_up_NG[group.rows]
        _multiply(x_rows, gate_up_EGD[group.experts].mT, group.counts, gate_up)
        # A scalar commutes with the down projection, and the inner rows are the narrower ones.
        inner = gated(gate_up, rows.scale_N[group.rows])
        _multiply(inner, down_EDF[group.experts].mT, group.counts, output_ND[group.rows])
    return gate_up_NG, output_ND


def _backward(
    grad_TD: Tensor, x_TD: Tensor, rows: ExpertRows, gate_up_EGD: Tensor, down_EDF: Tensor, kept_NG: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`experts_backward` in torch's operators."""
    grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
    grad_scale_N, grad_ND = torch.empty_like(rows.scale_N), x_TD.new_empty(len(rows.tokens_N), x_TD.shape[1])
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
        grad_gate_up, grad_scale_N[part], inner = gated_backward(grad_inner, gate_up, rows.scale_N[part])
        _weight_gradient(grad, inner, counts, grad_down_EDF[experts])
        _weight_gradient(grad_gate_up, x_rows, counts, grad_gate_up_EGD[experts])
        _multiply(grad_gate_up, gate_up_EGD[experts], counts, grad_ND[part])
    return grad_ND, grad_scale_N, grad_gate_up_EGD, grad_down_EDF


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
