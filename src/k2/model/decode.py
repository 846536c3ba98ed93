"""The forward pass of generation: prompts fill the latent cache, then one token per row and step.

Decoding never expands keys and values: the query is projected into the latent space and attention runs over
the cache itself (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorption").

Letters in shapes: B batch rows, L length, D hidden, H heads, K latent rank, R rotary, C = K + R, V vocabulary.
"""

import torch
from torch import Tensor

from k2.model.cache import LatentCache
from k2.model.layers import RMSNorm
from k2.model.mla import LatentAttention, attention_context
from k2.model.rope import rotary_tables
from k2.model.transformer import DecoderLayer, Transformer


def resident(model: Transformer) -> Transformer:
    """The model with its matrices in compute precision, experts passed through the weight transform.

    Shares storage with `model` wherever no conversion is needed. The router keeps its precision, because
    training routes in float32 too.
    """
    with torch.device("meta"):
        copy = Transformer(model.config, compute_dtype=model.compute_dtype)
    transforms = {name: m.weight_transform for name, m in model.named_modules() if hasattr(m, "weight_transform")}
    state = {}
    for name, value in model.state_dict().items():
        transform = transforms.get(name.rpartition(".")[0])
        value = value if transform is None else transform(value)
        state[name] = value if ".gate." in name else value.to(model.compute_dtype)
    copy.load_state_dict(state, assign=True)
    return copy.requires_grad_(False)


def prefill(model: Transformer, cache: LatentCache, tokens_BL: Tensor, lengths_B: Tensor, rows_B: Tensor) -> Tensor:
    """Run right-padded prompts, store their latents in cache rows `rows_B`; hidden states [B, D] of the last tokens.

    Causality keeps padding out: it comes after every real token, and decoding overwrites its slots.
    """
    context = attention_context(model.config, tokens_BL, model.compute_dtype)
    x_BLD = model.embed(tokens_BL)
    for number, layer in enumerate(_layers(model)):
        normed = layer.input_layernorm(x_BLD)
        latent, rotary = layer.self_attn.latents(normed, context.cos_BLR, context.sin_BLR)
        cache.fill(number, rows_B, torch.cat([latent, rotary], dim=-1))
        attended, _ = layer.self_attn.attend(normed, latent, rotary, context)
        x_BLD, _ = layer.feed_forward(x_BLD + attended)
    last_BD = x_BLD[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1]
    result: Tensor = _norm(model)(last_BD)
    return result


class Decoder:
    """One decoding step for a batch of rows; holds the rotary tables for all positions."""

    def __init__(self, model: Transformer, length: int) -> None:
        self.model = model
        positions = torch.arange(length, device=_norm(model).weight.device)
        self.cos_LR, self.sin_LR = rotary_tables(model.config, positions, model.compute_dtype)
        self.slots_L = positions

    def step(self, cache: LatentCache, tokens_B: Tensor, slots_B: Tensor, longest: int) -> Tensor:
        """Append each row's token at slot `slots_B` (all below `longest`); hidden states [B, D] that follow."""
        cos_BR, sin_BR = self.cos_LR[slots_B], self.sin_LR[slots_B]
        hidden = self.slots_L[None, :longest] > slots_B[:, None]
        bias_B1L = torch.zeros(hidden.shape, dtype=cos_BR.dtype, device=hidden.device)
        bias_B1L = bias_B1L.masked_fill_(hidden, -torch.inf)[:, None]
        x_BD = self.model.embed(tokens_B)
        for number, layer in enumerate(_layers(self.model)):
            normed_BD = layer.input_layernorm(x_BD)
            latent, rotary = layer.self_attn.latents(normed_BD, cos_BR, sin_BR)
            cache.append(number, slots_B, torch.cat([latent, rotary], dim=-1))
            past_BLC = cache.read(number, len(tokens_B), longest)
            x_BD = x_BD + _attend_latents(layer.self_attn, normed_BD, cos_BR, sin_BR, past_BLC, bias_B1L)
            x_BD = layer.feed_forward(x_BD[:, None])[0][:, 0]
        result: Tensor = _norm(self.model)(x_BD)
        return result


def _attend_latents(
    attention: LatentAttention, x_BD: Tensor, cos_BR: Tensor, sin_BR: Tensor, past_BLC: Tensor, bias_B1L: Tensor
) -> Tensor:
    """Attention of one new token per row over the cached latents; output [B, D]."""
    config = attention.config
    heads, rank, nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    content, rotary = attention.queries(x_BD[:, None], cos_BR[:, None], sin_BR[:, None])
    expand_HXK = attention.kv_b_proj.weight.view(heads, -1, rank)
    in_latent_HBK = torch.bmm(content[:, 0].transpose(0, 1), expand_HXK[:, :nope])
    query_BHC = torch.cat([in_latent_HBK.transpose(0, 1), rotary[:, 0]], dim=-1)
    logits_BHL = torch.baddbmm(bias_B1L, query_BHC, past_BLC.transpose(1, 2), alpha=attention.scale)
    mixed_BHK = torch.bmm(logits_BHL.softmax(-1), past_BLC[..., :rank])
    values_HBV = torch.bmm(mixed_BHK.transpose(0, 1), expand_HXK[:, nope:].transpose(1, 2))
    output: Tensor = attention.o_proj(values_HBV.transpose(0, 1).flatten(1))
    return output


def _layers(model: Transformer) -> list[DecoderLayer]:
    return [layer for layer in model.layers.values() if isinstance(layer, DecoderLayer)]


def _norm(model: Transformer) -> RMSNorm:
    assert model.norm is not None, "generation needs the whole model"
    return model.norm
