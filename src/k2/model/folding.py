"""Weights as a decoding step wants them: what precedes a product is part of its matrix.

Gains of norms and the scale of attention go into the matrix that follows, query and key projections become one matrix,
and so do the first projections of queries and latents. Keys and values are never expanded: queries are projected into
the latent space (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorption").

Letters in shapes: D hidden, H heads, X query/key width of a head, N content part of it, K latent rank, R rotary,
C = R + K, O = C and all queries' first projection, Q query latents, Z = H * C, W value width of a head, E experts,
F expert hidden, G = 2F.
"""

from math import sqrt

import torch
from torch import Tensor

from k2.kernels.cpu.decode import LayerWeights
from k2.model.layers import GatedMLP, RMSNorm
from k2.model.mla import LatentAttention
from k2.model.moe import MixtureOfExperts
from k2.model.transformer import DecoderLayer


def gain(norm: RMSNorm, dtype: torch.dtype) -> Tensor:
    """What the matrix after a norm is multiplied with, so that the norm only has to divide by a length."""
    return norm.weight.data.to(torch.promote_types(dtype, torch.float32)) * sqrt(len(norm.weight))


def fold_attention(attention: LatentAttention, gain_D: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """First projections [O, D], second one of queries [Z, Q] or None, and latents to values [H, W, K]."""
    config, wide = attention.config, gain_D.dtype
    expand_KK = attention.kv_b_proj.weight.data * gain(attention.kv_a_layernorm, wide)
    expand_HXK = expand_KK.view(config.num_attention_heads, -1, config.kv_lora_rank)
    keys_HNK, values_HWK = expand_HXK.split_with_sizes([config.qk_nope_head_dim, config.v_head_dim], 1)
    latents_CD = attention.kv_a_proj_with_mqa.weight.data.roll(config.qk_rope_head_dim, 0)
    if config.q_lora_rank is None:
        queries_ZD = _absorb(attention.q_proj.weight.data, keys_HNK, attention.scale)
        return torch.cat([queries_ZD, latents_CD]) * gain_D, None, values_HWK
    queries_ZQ = _absorb(attention.q_b_proj.weight.data, keys_HNK, attention.scale) * gain(
        attention.q_a_layernorm, wide
    )
    return torch.cat([attention.q_a_proj.weight.data, latents_CD]) * gain_D, queries_ZQ, values_HWK


def _absorb(query_XQ: Tensor, keys_HNK: Tensor, scale: float) -> Tensor:
    """The query projection [H * X, Q] into the latent space, scaled, rotary part first: [Z, Q]."""
    heads, content = keys_HNK.shape[:2]
    query_HXQ = query_XQ.view(heads, -1, query_XQ.shape[1]) * scale
    latent_HKQ = torch.bmm(keys_HNK.mT, query_HXQ[:, :content].to(keys_HNK.dtype))
    return torch.cat([query_HXQ[:, content:], latent_HKQ], 1).flatten(0, 1)


def expert_tables(mlp: GatedMLP | MixtureOfExperts, gain_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up [E, G, D] and down [E, D, F] of routed experts, then of shared ones, or of a dense MLP alone."""
    if isinstance(mlp, GatedMLP):
        return (mlp.gate_up_proj.weight.data * gain_D)[None], mlp.down_proj.weight.data[None]
    gate_up_EGD, down_EDF = mlp.experts.gate_up_proj.data, mlp.experts.down_proj.data
    if mlp.experts.weight_transform is not None:
        gate_up_EGD, down_EDF = (mlp.experts.weight_transform(weight) for weight in (gate_up_EGD, down_EDF))
    if mlp.shared_experts is not None:
        hidden, width = down_EDF.shape[1:]
        shared = mlp.shared_experts
        shared_EGD = shared.gate_up_proj.weight.data.view(2, -1, width, hidden).transpose(0, 1).flatten(1, 2)
        shared_EDF = shared.down_proj.weight.data.view(hidden, -1, width).transpose(0, 1)
        gate_up_EGD, down_EDF = torch.cat([gate_up_EGD, shared_EGD]), torch.cat([down_EDF, shared_EDF])
    return gate_up_EGD * gain_D, down_EDF


def layer_weights(layer: DecoderLayer, dtype: torch.dtype) -> LayerWeights:
    """A whole layer for the C kernels."""
    mlp, gain_D = layer.mlp, gain(layer.post_attention_layernorm, dtype)
    joined_OD, q_b_ZQ, values_HWK = fold_attention(layer.self_attn, gain(layer.input_layernorm, dtype))
    gate_up_EGD, down_EDF = expert_tables(mlp, gain_D)
    gate = mlp.gate if isinstance(mlp, MixtureOfExperts) else None
    return LayerWeights(
        joined_OD=joined_OD,
        q_b_ZQ=q_b_ZQ,
        values_HWK=values_HWK,
        output_DY=layer.self_attn.o_proj.weight.data,
        gate_up_EGD=gate_up_EGD,
        down_EDF=down_EDF,
        router_ED=None if gate is None else gate.weight.data * gain_D,
        bias_E=None if gate is None else gate.e_score_correction_bias,
    )
