"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) for training and prefill.

Queries, keys and values pass through low-rank latents; one rotary key is shared by all heads. The attention
returns what QK-Clip needs, the largest logit of every head, from the logits it computes anyway.

Letters in shapes: B batch, L length, D hidden, H heads, K latent rank, R rotary, X query/key width of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from k2.config.model import ModelConfig
from k2.model.layers import Linear, RMSNorm, upcast
from k2.model.rope import rotary_tables, rotate, softmax_scale

LATENT_NORM_EPS = 1e-6  # fixed in the reference implementation, whatever rms_norm_eps says
QUERY_BLOCK = 128  # queries that share one set of keys; what lies above the diagonal outside of a block is skipped


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share.

    cos_BLR, sin_BLR: rotary tables, [B or 1, L, R/2].
    bias: 0 where a query may look, -inf where not, [B * H, L, L]; None when a token sees all earlier ones.
    keep_BL: real tokens, or None when all are.
    """

    cos_BLR: Tensor
    sin_BLR: Tensor
    bias: Tensor | None
    keep_BL: Tensor | None


def attention_context(
    config: ModelConfig,
    tokens_BL: Tensor,
    dtype: torch.dtype,
    positions_BL: Tensor | None = None,
    documents_BL: Tensor | None = None,
    keep_BL: Tensor | None = None,
) -> AttentionContext:
    """Rotary tables and mask for a batch of shape [B, L].

    A token sees itself and earlier tokens, only those with its number in `documents_BL` and only those that
    `keep_BL` marks real. Positions default to 0..L-1.
    """
    length, device = tokens_BL.shape[1], tokens_BL.device
    if positions_BL is None:
        positions_BL = torch.arange(length, device=device)[None]
    cos_BLR, sin_BLR = rotary_tables(config, positions_BL, dtype)
    if documents_BL is None and keep_BL is None:
        return AttentionContext(cos_BLR, sin_BLR, None, None)
    allowed = torch.ones(tokens_BL.shape[0], length, length, dtype=torch.bool, device=device).tril()
    if documents_BL is not None:
        allowed = allowed & (documents_BL[:, :, None] == documents_BL[:, None, :])
    if keep_BL is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)  # a padding row must see something
        allowed = allowed & (keep_BL[:, None, :] | itself)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)
    bias = bias.repeat_interleave(config.num_attention_heads, dim=0)
    return AttentionContext(cos_BLR, sin_BLR, bias, keep_BL)


class _Attention(torch.autograd.Function):
    """Causal attention by blocks of queries, each against the keys up to its end only; N is batch times heads."""

    @staticmethod
    def forward(
        ctx: Any, q_NLX: Tensor, k_NLX: Tensor, v_NLV: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        output_NLV, row_max_NL = torch.empty_like(v_NLV), q_NLX.new_empty(q_NLX.shape[:2])
        kept = []
        for start, stop in _blocks(q_NLX.shape[1]):
            logits = torch.bmm(q_NLX[:, start:stop], k_NLX[:, :stop].transpose(1, 2)).mul_(scale)
            if bias is None:
                logits[:, :, start:] += _causal_bias(stop - start, logits)
            else:
                logits += bias[:, start:stop, :stop]
            torch.amax(logits, -1, out=row_max_NL[:, start:stop])
            probabilities = logits.softmax(-1)
            torch.bmm(probabilities, v_NLV[:, :stop], out=output_NLV[:, start:stop])
            kept.append(probabilities)
        ctx.scale = scale
        ctx.save_for_backward(q_NLX, k_NLX, v_NLV, *kept)
        ctx.mark_non_differentiable(row_max_NL)
        return output_NLV, row_max_NL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NLV: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_NLX, k_NLX, v_NLV, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q_NLX)
        grad_k, grad_v = torch.zeros_like(upcast(k_NLX)), torch.zeros_like(upcast(v_NLV))
        for (start, stop), probabilities in zip(_blocks(q_NLX.shape[1]), kept, strict=True):
            grad = grad_NLV[:, start:stop]
            grad_p = torch.bmm(grad, v_NLV[:, :stop].transpose(1, 2))
            grad_logits = torch._softmax_backward_data(grad_p, probabilities, -1, grad.dtype)
            torch.bmm(grad_logits, k_NLX[:, :stop], out=grad_q[:, start:stop])
            grad_v[:, :stop] += torch.bmm(probabilities.transpose(1, 2), grad)
            grad_k[:, :stop] += torch.bmm(grad_logits.transpose(1, 2), q_NLX[:, start:stop])
        grad_k = grad_k.mul_(ctx.scale).to(k_NLX.dtype)
        return grad_q.mul_(ctx.scale), grad_k, grad_v.to(v_NLV.dtype), None, None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _causal_bias(length: int, like: Tensor) -> Tensor:
    return like.new_full((length, length), -torch.inf).triu_(1)


def attend(
    q_BHLX: Tensor, k_BHLX: Tensor, v_BHLV: Tensor, scale: float, context: AttentionContext
) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, L, V] and the largest logit that reached each head's softmax, [H].

    Logits include the scale; masked pairs and padding rows do not count.
    """
    parts = (tensor.flatten(0, 1) for tensor in (q_BHLX, k_BHLX, v_BHLV))
    output_NLV, row_max_NL = _Attention.apply(*parts, context.bias, scale)  # type: ignore[no-untyped-call]
    row_max_BHL = row_max_NL.view(q_BHLX.shape[:3])
    if context.keep_BL is not None:
        row_max_BHL = row_max_BHL.masked_fill(~context.keep_BL[:, None, :], -torch.inf)
    return output_NLV.view(v_BHLV.shape), upcast(row_max_BHL.amax((0, 2)))


class LatentAttention(nn.Module):
    """One attention block; parameters are named as in Hugging Face's `self_attn`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.q_lora_rank
        if rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, rank)
            self.q_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)

    def queries(self, x_BLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> tuple[Tensor, Tensor]:
        """Content and rotated parts of every head's query, [B, L, H, X - R] and [B, L, H, R]."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_BLD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BLD)))
        q = q.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))
        content, rotary = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return content, rotate(rotary, cos_BLR[:, :, None], sin_BLR[:, :, None])

    def latents(self, x_BLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache keeps: the normed latent [B, L, K] and the rotated shared key [B, L, R]."""
        latent, rotary = self.kv_a_proj_with_mqa(x_BLD).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent), rotate(rotary, cos_BLR, sin_BLR)

    def forward(self, x_BLD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Attention output [B, L, D] and each head's largest logit [H]."""
        return self.attend(x_BLD, *self.latents(x_BLD, context.cos_BLR, context.sin_BLR), context)

    def attend(
        self, x_BLD: Tensor, latent_BLK: Tensor, k_rotary_BLR: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """`forward` for latents that the caller has already computed, and perhaps kept."""
        heads, nope, value = self.config.num_attention_heads, self.config.qk_nope_head_dim, self.config.v_head_dim
        q_content, q_rotary = self.queries(x_BLD, context.cos_BLR, context.sin_BLR)
        kv = self.kv_b_proj(latent_BLK).unflatten(-1, (heads, nope + value)).transpose(1, 2)
        k_content, v = kv.split([nope, value], dim=-1)
        q = torch.cat([q_content.transpose(1, 2), q_rotary.transpose(1, 2)], dim=-1)
        k = torch.cat([k_content, k_rotary_BLR[:, None].expand(-1, heads, -1, -1)], dim=-1)
        output, max_H = attend(q, k, v, self.scale, context)
        return self.o_proj(output.transpose(1, 2).flatten(2)), max_H
