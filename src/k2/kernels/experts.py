"""Routed experts on a GPU: grouped products and SwiGLU over rows ordered by expert, whatever the experts' counts.

Nothing waits for the host. Weights are cast to the rows' type when used; sums over a token's rows have a fixed order.

Letters in shapes: T tokens, S choices per token, E experts, N = T S rows, D hidden, F expert hidden, G = 2F.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.kernels.grouped_gemm import rows_product, weight_product
from k2.kernels.swiglu import gated, gated_backward
from k2.model.activations import Keep


class Rows(NamedTuple):
    """Rows ordered by expert, int32.

    slots_TS: row of each (token, choice). source_N, tokens_N: pair and token of each row. offsets_E: first rows, and N.
    """

    slots_TS: Tensor
    source_N: Tensor
    tokens_N: Tensor
    offsets_E: Tensor


def arrange(experts_TS: Tensor, count: int) -> Rows:
    """Order (token, choice) pairs by expert, pairs of one expert in token order."""
    chosen_N = experts_TS.flatten()
    source_N = chosen_N.argsort(stable=True)
    slots_N = torch.empty_like(source_N)
    slots_N[source_N] = torch.arange(len(source_N), device=source_N.device)
    ends_E = torch.searchsorted(chosen_N[source_N], torch.arange(count, device=source_N.device), right=True)
    tensors = slots_N.view_as(experts_TS), source_N, source_N // experts_TS.shape[1], F.pad(ends_E, (1, 0))
    return Rows(*(tensor.to(torch.int32) for tensor in tensors))


class _RoutedExperts(torch.autograd.Function):
    """Keeps its inputs and what `keep` leaves of the fused gate and up of every row."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TS: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, rows: Rows, keep: Keep
    ) -> Tensor:
        scale_N = weights_TS.flatten().index_select(0, rows.source_N)
        gate_up_NG = _gate_up(x_TD.index_select(0, rows.tokens_N), gate_up_EGD, rows)
        inner_NF = gated(gate_up_NG, scale_N)
        output_ND = rows_product(inner_NF, down_EDF.to(x_TD.dtype), rows.offsets_E)
        ctx.rows = rows
        ctx.save_for_backward(x_TD, scale_N, gate_up_EGD, down_EDF, keep(gate_up_NG))
        return _total(output_ND, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows: Rows = ctx.rows
        x_TD, scale_N, gate_up_EGD, down_EDF, gate_up_NG = ctx.saved_tensors
        x_ND, grad_ND = (tensor.index_select(0, rows.tokens_N) for tensor in (x_TD, grad_TD))
        if gate_up_NG is None:
            gate_up_NG = _gate_up(x_ND, gate_up_EGD, rows)
        grad_inner_NF = rows_product(grad_ND, down_EDF.to(x_TD.dtype).mT, rows.offsets_E)
        grad_NG, grad_scale_N, inner_NF = gated_backward(grad_inner_NF, gate_up_NG, scale_N)
        grad_down = weight_product(grad_ND, inner_NF, rows.offsets_E).to(down_EDF.dtype)
        grad_gate_up = weight_product(grad_NG, x_ND, rows.offsets_E).to(gate_up_EGD.dtype)
        grad_x = _total(rows_product(grad_NG, gate_up_EGD.to(x_TD.dtype).mT, rows.offsets_E), rows)
        return grad_x, grad_scale_N[rows.slots_TS], grad_gate_up, grad_down, None, None


def _gate_up(x_ND: Tensor, gate_up_EGD: Tensor, rows: Rows) -> Tensor:
    return rows_product(x_ND, gate_up_EGD.to(x_ND.dtype), rows.offsets_E)


def _total(rows_ND: Tensor, rows: Rows) -> Tensor:
    """The sum of every token's rows."""
    return F.embedding_bag(rows.slots_TS, rows_ND, mode="sum")


def routed_experts(
    x_TD: Tensor, weights_TS: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, rows: Rows, keep: Keep
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, [T, D]; what `keep` drops of gate and up is computed again."""
    result: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
        x_TD, weights_TS, gate_up_EGD, down_EDF, rows, keep
    )
    return result
