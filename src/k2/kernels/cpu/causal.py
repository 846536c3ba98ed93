"""Causal attention in training on a CPU with bfloat16 dot products: no probabilities are written to memory.

They are computed again in the backward pass, as FlashAttention-2 does (arXiv 2307.08691, section 3.1).

Letters in shapes: B batch, H heads, L length, X query and key width, V value width.
"""

import torch
from torch import Tensor

from k2.kernels.cpu import _run, scratch, serves
from k2.kernels.cpu.gemm import has_gemm


def serves_attention(*heads: Tensor) -> bool:
    """Whether the kernels take these; pairs of values are multiplied at once, so that widths are even."""
    return all(x.shape[-1] % 2 == 0 for x in heads) and serves(*heads) and has_gemm()


def causal_attention(
    q_BHLX: Tensor, k_BHLX: Tensor, v_BHLV: Tensor, bias_BLL: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, L, H, V], each query's largest logit [B, H, L], and the logarithm of its sum of exponentials.

    Logits are scaled, then the float32 bias is added. All tensors are contiguous.
    """
    batch, number, length, values = v_BHLV.shape
    out_BLHV = v_BHLV.new_empty(batch, length, number, values)
    row_max, log_sums = (torch.empty(batch, number, length) for _ in range(2))
    memory, sizes = _scratch(q_BHLX, v_BHLV)
    _run("causal_attention", q_BHLX, k_BHLX, v_BHLV, bias_BLL, out_BLHV, row_max, log_sums, memory, *sizes, scale)
    return out_BLHV, row_max, log_sums


def causal_attention_backward(
    grad_BLHV: Tensor,
    q_BHLX: Tensor,
    k_BHLX: Tensor,
    v_BHLV: Tensor,
    bias_BLL: Tensor | None,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by queries, keys and values."""
    grads = torch.empty_like(q_BHLX), torch.empty_like(k_BHLX), torch.empty_like(v_BHLV)
    memory, sizes = _scratch(q_BHLX, v_BHLV)
    inputs = grad_BLHV.contiguous(), q_BHLX, k_BHLX, v_BHLV, bias_BLL, log_sums
    _run("causal_attention_backward", *inputs, *grads, memory, *sizes, scale)
    return grads


def _scratch(q_BHLX: Tensor, v_BHLV: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Memory of all threads, and the sizes that both kernels take."""
    (batch, number, length, width), values = q_BHLX.shape, v_BHLV.shape[-1]
    memory = scratch("causal_scratch", length, width, values)
    return memory, (batch, number, length, width, values, len(memory))
