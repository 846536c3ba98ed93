"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) for training and prefill.

Queries, keys and values pass through low-rank latents; one rotary key is shared by all heads.

Letters in shapes: B batch, L length, D hidden, H heads, K latent rank, R rotary, X query/key width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from k2.config.model import ModelConfig
from k2.kernels import cpu
from k2.model.activations import Call, Keep, keep_it, plain_call
from k2.model.attention import AttentionContext, attend
from k2.model.backend import kernels_for, runs_in_c
from k2.model.layers import Linear, RMSNorm
from k2.model.rope import rotate, rotations, softmax_scale, turned, turned_back

LATENT_NORM_EPS = 1e-6  # fixed in the reference implementation, whatever rms_norm_eps says


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
    turn_BLR = rotations(config, positions_BL, dtype)
    if kernels := kernels_for(torch.empty(0, dtype=dtype, device=device)):
        return AttentionContext(turn_BLR, None, keep_BL, kernels.packed(tokens_BL, documents_BL, keep_BL))
    if documents_BL is None and keep_BL is None:
        return AttentionContext(turn_BLR, None, None)
    allowed = torch.ones(tokens_BL.shape[0], length, length, dtype=torch.bool, device=device).tril()
    if documents_BL is not None:
        allowed = allowed & (documents_BL[:, :, None] == documents_BL[:, None, :])
    if keep_BL is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)  # a padding row must see something
        allowed = allowed & (keep_BL[:, None, :] | itself)
    bias_BLL = torch.zeros_like(allowed, dtype=turn_BLR.real.dtype).masked_fill_(~allowed, -torch.inf)
    return AttentionContext(turn_BLR, bias_BLL, keep_BL)


class _Heads(torch.autograd.Function):
    """Queries, keys and values [B, H, L, .] of every head from what the projections give, positions turned in."""

    @staticmethod
    def forward(
        ctx: Any, q_BLHX: Tensor, kv_BLHY: Tensor, rotary_BLR: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.nope = nope = q_BLHX.shape[-1] - rotary_BLR.shape[-1]
        ctx.save_for_backward(turn)
        if runs_in_c(q_BLHX):
            return cpu.heads(q_BLHX, kv_BLHY, rotary_BLR, turn)
        batch, length, heads, width = q_BLHX.shape
        q_BHLX, k_BHLX = (q_BLHX.new_empty(batch, heads, length, width) for _ in range(2))
        q_BHLX[..., :nope] = q_BLHX[..., :nope].transpose(1, 2)
        q_BHLX[..., nope:] = turned(q_BLHX[..., nope:], turn).transpose(1, 2)
        k_BHLX[..., :nope] = kv_BLHY[..., :nope].transpose(1, 2)
        k_BHLX[..., nope:] = rotary_BLR[:, None]
        return q_BHLX, k_BHLX, kv_BLHY[..., nope:].transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        nope, (turn,) = ctx.nope, ctx.saved_tensors
        if runs_in_c(grad_q):
            return *cpu.heads_backward(grad_q, grad_k, grad_v, turn), None
        batch, heads, length, width = grad_q.shape
        grad_q_BLHX = grad_q.new_empty(batch, length, heads, width)
        grad_q_BLHX[..., :nope] = grad_q[..., :nope].transpose(1, 2)
        grad_q_BLHX[..., nope:] = turned_back(grad_q[..., nope:].transpose(1, 2), turn)
        grad_kv_BLHY = torch.cat([grad_k[..., :nope], grad_v], dim=-1).transpose(1, 2)
        return grad_q_BLHX, grad_kv_BLHY, grad_k[..., nope:].sum(1), None


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
        self.call: Call = plain_call
        self.keep_probabilities: Keep = keep_it

    def query_latents(self, x_BLD: Tensor) -> Tensor:
        """What queries are projected from: the normed latent, or `x_BLD` itself without a latent rank."""
        latent: Tensor = x_BLD if self.config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x_BLD))
        return latent

    def queries(self, latent_BLK: Tensor) -> Tensor:
        """Every head's query [B, L, H, X], rotary dimensions last and not yet rotated."""
        projection = self.q_proj if self.config.q_lora_rank is None else self.q_b_proj
        return self._by_head(projection(latent_BLK))

    def _by_head(self, x_BLI: Tensor) -> Tensor:
        return x_BLI.view(*x_BLI.shape[:2], self.config.num_attention_heads, -1)

    def latents(self, x_BLD: Tensor, turn_BLR: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache keeps: the normed latent [B, L, K] and the rotated shared key [B, L, R]."""
        latent, rotary = self.kv_a_proj_with_mqa(x_BLD).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent), rotate(rotary, turn_BLR)

    def forward(self, x_BLD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Attention output [B, L, D] and each head's largest logit [H]."""
        return self.attend(x_BLD, *self.latents(x_BLD, context.turn_BLR), context)

    def attend(
        self, x_BLD: Tensor, latent_BLK: Tensor, k_rotary_BLR: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """`forward` for latents that the caller has already computed, and perhaps kept."""
        turn_BL1R = context.turn_BLR[:, :, None]
        if kernels := kernels_for(x_BLD):
            parts = self.call(self._parts, self.query_latents(x_BLD), latent_BLK, turn_BL1R)
            output_BLHV, max_H = kernels.attention(*parts, k_rotary_BLR, context.packing, self.scale)
        else:
            q, k, v = self.call(self._heads, self.query_latents(x_BLD), latent_BLK, k_rotary_BLR, turn_BL1R)
            output_BLHV, max_H = attend(q, k, v, self.scale, context, self.keep_probabilities)
        return self.o_proj(output_BLHV.flatten(2)), max_H

    def _heads(
        self, q_latent_BLK: Tensor, latent_BLK: Tensor, k_rotary_BLR: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head from what they are projected from."""
        kv_BLHY = self._by_head(self.kv_b_proj(latent_BLK))
        q, k, v = _Heads.apply(self.queries(q_latent_BLK), kv_BLHY, k_rotary_BLR, turn)  # type: ignore[no-untyped-call]
        return q, k, v

    def _parts(self, q_latent_BLK: Tensor, latent_BLK: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the kernels: queries [B, L, H, X], their rotated rotary part, and keys and values side by side."""
        q_BLHX = self.queries(q_latent_BLK)
        q_rotary = rotate(q_BLHX[..., self.config.qk_nope_head_dim :], turn)
        return q_BLHX, q_rotary, self._by_head(self.kv_b_proj(latent_BLK))
