"""Causal attention of many queries, for training and prefill: in C on a CPU with dot products, else in torch.

It returns what QK-Clip needs, the largest logit of every head, from the logits it computes anyway.

Letters in shapes: B batch, L length, H heads, X query and key width, V value width, N batch and heads, Q queries,
K keys, R rotary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.kernels import cpu
from k2.kernels.cpu.causal import causal_attention, causal_attention_backward, serves_attention
from k2.model.activations import Keep, keep_it
from k2.model.backend import runs_in_c
from k2.model.layers import upcast

QUERY_BLOCK = 128  # queries that share one set of keys; what lies above the diagonal outside of a block is skipped


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share.

    turn_BLR: rotation of every position, [B or 1, L, R/2] complex.
    bias_BLL: 0 where a query may look, -inf where not; None when a token sees all earlier ones.
    keep_BL: real tokens, or None when all are.
    packing: both for the kernels, which need no mask; None when torch attends.
    """

    turn_BLR: Tensor
    bias_BLL: Tensor | None
    keep_BL: Tensor | None
    packing: Any = None


class _InC(torch.autograd.Function):
    """Keeps its inputs and one number a query."""

    @staticmethod
    def forward(
        ctx: Any, q_BHLX: Tensor, k_BHLX: Tensor, v_BHLV: Tensor, bias_BLL: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        output_BLHV, row_max_BHL, log_sums_BHL = causal_attention(q_BHLX, k_BHLX, v_BHLV, bias_BLL, scale)
        ctx.bias_BLL, ctx.scale = bias_BLL, scale
        ctx.save_for_backward(q_BHLX, k_BHLX, v_BHLV, log_sums_BHL)
        ctx.mark_non_differentiable(row_max_BHL)
        return output_BLHV, row_max_BHL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLX, k_BHLX, v_BHLV, log_sums_BHL = ctx.saved_tensors
        inputs = q_BHLX, k_BHLX, v_BHLV, ctx.bias_BLL, log_sums_BHL
        return *causal_attention_backward(grad_BLHV, *inputs, ctx.scale), None, None


class _Attention(torch.autograd.Function):
    """Causal attention by blocks of queries, each against the keys up to its end only.

    Keeps its inputs and what `keep` leaves of the probabilities; the rest is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHLX: Tensor, k_BHLX: Tensor, v_BHLV: Tensor, bias_BLL: Tensor | None, scale: float, keep: Keep
    ) -> tuple[Tensor, Tensor]:
        output_BLHV = v_BHLV.new_empty([*v_BHLV.transpose(1, 2).shape])
        row_max_BHL, kept = upcast(q_BHLX[:0]).new_empty(q_BHLX.shape[:3]), []
        for start, stop in _blocks(q_BHLX.shape[2]):
            probabilities = _probabilities(q_BHLX, k_BHLX, bias_BLL, scale, start, stop, row_max_BHL)
            mixed = torch.bmm(probabilities, v_BHLV[:, :, :stop].flatten(0, 1))
            output_BLHV[:, start:stop] = mixed.view_as(v_BHLV[:, :, start:stop]).transpose(1, 2)
            kept.append(keep(probabilities))
        ctx.bias_BLL, ctx.scale = bias_BLL, scale
        ctx.save_for_backward(q_BHLX, k_BHLX, v_BHLV, *kept)
        ctx.mark_non_differentiable(row_max_BHL)
        return output_BLHV, row_max_BHL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLHV: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_BHLX, k_BHLX, v_BHLV, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q_BHLX)
        grad_k: Tensor | None = None
        grad_v: Tensor | None = None
        *blocks, longest = zip(_blocks(q_BHLX.shape[2]), kept, strict=True)
        for (start, stop), probabilities in (longest, *blocks):
            if probabilities is None:
                probabilities = _probabilities(q_BHLX, k_BHLX, ctx.bias_BLL, ctx.scale, start, stop)
            grad_NQV = grad_BLHV[:, start:stop].transpose(1, 2).flatten(0, 1)
            grad_p = torch.bmm(grad_NQV, v_BHLV[:, :, :stop].flatten(0, 1).mT)
            grad_logits = _softmax_backward(grad_p, probabilities, start)
            grad_q.flatten(0, 1)[:, start:stop] = _product(grad_logits, k_BHLX[:, :, :stop], ctx.scale)
            grad_v = _added(grad_v, torch.bmm(probabilities.mT, grad_NQV))
            grad_k = _added(grad_k, _product(grad_logits.mT, q_BHLX[:, :, start:stop], ctx.scale))
        assert grad_k is not None  # for the types, as below: there is at least one block
        assert grad_v is not None
        found = grad_q, grad_k.view_as(k_BHLX).to(grad_q.dtype), grad_v.view_as(v_BHLV).to(grad_q.dtype)
        return *found, None, None, None


def _probabilities(
    q_BHLX: Tensor,
    k_BHLX: Tensor,
    bias_BLL: Tensor | None,
    scale: float,
    start: int,
    stop: int,
    row_max_BHL: Tensor | None = None,
) -> Tensor:
    """Attention [N, Q, K] of the queries `start` to `stop`, N batch and heads; their largest logits go to `row_max`."""
    logits_NQK = _product(q_BHLX[:, :, start:stop], k_BHLX[:, :, :stop].mT, scale)
    if row_max_BHL is None:
        row_max_BHL = upcast(q_BHLX[:0]).new_empty(q_BHLX.shape[:3])
    if runs_in_c(logits_NQK):
        return cpu.causal_softmax(logits_NQK, bias_BLL, row_max_BHL, start)
    wide = upcast(logits_NQK)  # maximum and softmax of float32 are faster than those of bfloat16
    _mask(wide.view(*q_BHLX.shape[:2], stop - start, stop), bias_BLL, start)
    torch.amax(wide, -1, out=row_max_BHL.flatten(0, 1)[:, start:stop])
    return logits_NQK.copy_(torch.softmax(wide, -1, out=wide))


def _softmax_backward(grad_NQK: Tensor, probabilities_NQK: Tensor, start: int) -> Tensor:
    if runs_in_c(grad_NQK):
        return cpu.causal_softmax_backward(grad_NQK, probabilities_NQK, start)
    return torch._softmax_backward_data(grad_NQK, probabilities_NQK, -1, grad_NQK.dtype)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _mask(logits_BHQK: Tensor, bias_BLL: Tensor | None, start: int) -> None:
    """Set the logits of queries from `start` on to -inf where they may not look."""
    queries, stop = logits_BHQK.shape[2:]
    if bias_BLL is None:
        logits_BHQK[..., start:].add_(logits_BHQK.new_full((queries, queries), -torch.inf).triu_(1))
    else:
        logits_BHQK.add_(bias_BLL[:, None, start:stop, :stop])


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """a b scale of two batches [N, ., .] or [B, H, ., .] as [N, ., .], scaled where the product is accumulated."""
    a, b = (tensor.flatten(0, -3) for tensor in (a, b))
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Sum of tensors [N, I, J] that begin at the same row, the longest first; of several in at least float32."""
    if total is None:
        return part
    total = upcast(total)
    total[:, : part.shape[1]].add_(upcast(part))
    return total


def attend(
    q_BHLX: Tensor, k_BHLX: Tensor, v_BHLV: Tensor, scale: float, context: AttentionContext, keep: Keep = keep_it
) -> tuple[Tensor, Tensor]:
    """Attention output [B, L, H, V] and the largest logit that reached each head's softmax, [H].

    Logits include the scale; masked pairs and padding rows do not count. `keep` says what the backward pass is left
    of the probabilities, of which C writes none.
    """
    inputs = *(x.contiguous() for x in (q_BHLX, k_BHLX, v_BHLV)), context.bias_BLL, scale
    if runs_in_c(q_BHLX) and serves_attention(q_BHLX, k_BHLX, v_BHLV):
        output_BLHV, row_max_BHL = _InC.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        output_BLHV, row_max_BHL = _Attention.apply(*inputs, keep)  # type: ignore[no-untyped-call]
    if context.keep_BL is not None:
        row_max_BHL = row_max_BHL.masked_fill(~context.keep_BL[:, None, :], -torch.inf)
    return output_BLHV, row_max_BHL.amax((0, 2))
