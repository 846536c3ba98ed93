"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) for training and prefill.

Queries, keys and values pass through low-rank latents; one rotary key is shared by all heads. The attention
returns what QK-Clip needs, the largest logit of every head, from the logits it computes anyway.

Letters in shapes: B batch, L length, D hidden, H heads, K latent rank, R rotary, X query/key width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k2.config.model import ModelConfig
from k2.model.layers import Linear, RMSNorm
from k2.model.rope import rotary_tables, rotate, softmax_scale

LATENT_NORM_EPS = 1e-6  # fixed in the reference implementation, whatever rms_norm_eps says


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share.

    cos_BLR, sin_BLR: rotary tables, [B or 1, L, R/2].
    bias: 0 where a query may look, -inf where not, [1, L, L] or [B * H, L, L].
    keep_BL: real tokens, or None when all are.
    """

    cos_BLR: Tensor
    sin_BLR: Tensor
    bias: Tensor
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
    allowed = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    if documents_BL is not None:
        allowed = allowed & (documents_BL[:, :, None] == documents_BL[:, None, :])
    if keep_BL is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)  # a padding row must see something
        allowed = allowed & (keep_BL[:, None, :] | itself)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)
    if bias.shape[0] > 1:
        bias = bias.repeat_interleave(config.num_attention_heads, dim=0)
    return AttentionContext(cos_BLR, sin_BLR, bias, keep_BL)


def attend(
    q_BHLX: Tensor, k_BHLX: Tensor, v_BHLV: Tensor, scale: float, context: AttentionContext
) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, L, V] and the largest logit that reached each head's softmax, [H].

    Logits include the scale; masked pairs and padding rows do not count.
    """
    batch, heads, length, _ = q_BHLX.shape
    logits = torch.baddbmm(context.bias, q_BHLX.flatten(0, 1), k_BHLX.flatten(0, 1).transpose(1, 2), alpha=scale)
    with torch.no_grad():
        row_max_BHL = logits.amax(-1).view(batch, heads, length)
        if context.keep_BL is not None:
            row_max_BHL = row_max_BHL.masked_fill(~context.keep_BL[:, None, :], -torch.inf)
        max_H = row_max_BHL.amax((0, 2)).to(torch.promote_types(logits.dtype, torch.float32))
    output = torch.bmm(logits.softmax(-1), v_BHLV.flatten(0, 1))
    return output.view(batch, heads, length, -1), max_H


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
