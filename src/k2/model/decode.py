"""The forward pass of generation: prompts fill the latent cache, then one token per row and step.

Keys and values are never expanded: queries are projected into the latent space and attention runs over the cache
itself (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorption"). Few tokens make a step a matter of operators and
of memory traffic, not of arithmetic; so a weight version is prepared once. Gains of norms and the scale of attention
go into the matrix that follows, query and key projections become one matrix, and a token's latents are handled as
one more head of its queries. The residual stream is at least float32, and so is attention over the cache on a CPU,
which has no fast batched products in bfloat16.

Letters in shapes: T tokens, B batch rows, L length, D hidden, H heads, X query/key width of a head, N content part
of it, R rotary part of it, V value width of a head or vocabulary, K latent rank, C = R + K, I inputs.
"""

from math import sqrt

import torch
from torch import Tensor

from k2.kernels import cpu
from k2.model.backend import runs_in_c
from k2.model.cache import LatentCache
from k2.model.layers import GatedMLP, RMSNorm, upcast
from k2.model.mixture import DenseMLP, Mixture
from k2.model.mla import LatentAttention
from k2.model.products import Product
from k2.model.rope import rotary_tables
from k2.model.transformer import DecoderLayer, Transformer

QUERY_BLOCK = 128  # prompt tokens whose attention logits exist at once


class Decoder:
    """A prepared model, the latent cache of `rows` sequences, and rotary tables."""

    def __init__(self, model: "Prepared", rows: int, length: int) -> None:
        config, device = model.config, model.device
        self.model = model
        self.cache = LatentCache(config, rows, length, attention_dtype(model.dtype, device), device)
        self.slots_L = torch.arange(length, device=device)
        self.turns_L1R = torch.complex(*rotary_tables(config, self.slots_L, model.wide))[:, None]

    def prefill(self, tokens_BL: Tensor, rows_B: Tensor) -> None:
        """Store the latents of right-padded prompts in cache rows `rows_B`.

        Causality keeps padding out: it comes after every real token, and decoding overwrites its slots.
        """
        batch, length = tokens_BL.shape
        heads = _Heads(self.model, self.turns_L1R[:length].repeat(batch, 1, 1))
        x_TD = self.model.embed(tokens_BL.flatten())
        last = len(self.model.layers) - 1
        for number, layer in enumerate(self.model.layers):
            layer.attention.project(layer.normed(x_TD), heads)
            self.cache.fill(number, rows_B, heads.latents_TC.view(batch, length, -1))
            if number < last:
                layer.attention.causal(x_TD, heads, batch)
                layer.feed_forward(x_TD)

    def step(self, tokens: list[int], slots: list[int]) -> Tensor:
        """Put row b's token into slot `slots[b]`; logits [B, V] of the tokens that follow."""
        tokens_B, slots_B = torch.tensor([tokens, slots], device=self.model.device)
        longest, bias_B1L = max(slots) + 1, None
        if min(slots) + 1 < longest:
            later_BL = self.slots_L[:longest] > slots_B[:, None]
            bias_B1L = torch.zeros_like(later_BL, dtype=self.cache.dtype).masked_fill_(later_BL, -torch.inf)[:, None]
        heads = _Heads(self.model, self.turns_L1R.index_select(0, slots_B))
        places_B = self.cache.places(slots_B)
        x_BD = self.model.embed(tokens_B)
        for number, layer in enumerate(self.model.layers):
            layer.attention.project(layer.normed(x_BD), heads)
            past_BLC = self.cache.append(number, places_B, heads.latents_TC)[:, :longest]
            layer.attention.absorbed(x_BD, heads, past_BLC, bias_B1L)
            layer.feed_forward(x_BD)
        return self.model.logits(x_BD)


class _Heads:
    """What attention computes from T tokens: the queries of every head and, as one more head, the latents.

    Both hold rotary values first, as pairs that a complex number turns.
    """

    def __init__(self, model: "Prepared", turns_T1R: Tensor) -> None:
        config = model.config
        rotary = config.qk_rope_head_dim
        width = rotary + config.kv_lora_rank
        shape = (len(turns_T1R), config.num_attention_heads + 1, width + width % 2)
        heads_THC = torch.empty(shape, dtype=model.wide, device=model.device)[..., :width]
        self.turns_T1R = turns_T1R
        self.pairs_THR = torch.view_as_complex(heads_THC[..., :rotary].view(*shape[:2], -1, 2))
        self.queries_THC, self.latents_TC = heads_THC[:, :-1], heads_THC[:, -1]
        self.latent_TK = self.latents_TC[:, rotary:]


class Prepared:
    """The weights of a model as the step wants them; to be made anew when the weights change."""

    def __init__(self, model: Transformer) -> None:
        assert model.embed_tokens is not None, "generation needs the whole model"
        assert model.norm is not None
        assert model.lm_head is not None
        self.config, self.dtype, self.device = model.config, model.compute_dtype, model.embed_tokens.weight.device
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.embedding_VD = model.embed_tokens.weight.data.to(self.dtype)
        layers = (layer for layer in model.layers.values() if isinstance(layer, DecoderLayer))
        self.layers = [_Layer(layer, self.dtype) for layer in layers]
        self.norm = _Norm(model.norm, self.dtype)
        self.head = Product((model.lm_head.weight.data * self.norm.gain_D).to(self.dtype))

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token numbers to the residual stream [T, D]."""
        return self.embedding_VD.index_select(0, tokens_T).to(self.wide)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Residual stream to logits [T, V], in at least float32."""
        return upcast(self.head(self.norm(x_TD)))


class _Norm:
    """x over its length, in `dtype`; `gain` is what the matrix that follows has to be multiplied with."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        width = len(norm.weight)
        self.gain_D = norm.weight.data.to(torch.promote_types(dtype, torch.float32)) * sqrt(width)
        self.square_floor, self.dtype = width * norm.eps, dtype
        self.floor = self.gain_D.new_tensor(sqrt(self.square_floor))
        self.in_c = runs_in_c(self.gain_D.to(dtype))

    def length(self, x: Tensor) -> Tensor:
        """sqrt(sum of squares + width * eps) of each row."""
        length: Tensor = torch.linalg.vector_norm(x, 2, -1, True)
        return length.hypot_(self.floor)

    def __call__(self, x: Tensor) -> Tensor:
        """From float32 or wider to the precision of products."""
        if self.in_c:
            return cpu.unit_rows(x, self.square_floor)
        return torch.div(x, self.length(x)).to(self.dtype)


class _Layer:
    """One decoder layer on tokens [T, D]."""

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype) -> None:
        self.normed, self.normed_again = (
            _Norm(norm, dtype) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.attention = _Attention(layer.self_attn, self.normed.gain_D, dtype)
        mlp, gain_D = layer.mlp, self.normed_again.gain_D
        self.mlp = DenseMLP(mlp, gain_D, dtype) if isinstance(mlp, GatedMLP) else Mixture(mlp, gain_D, dtype)

    def feed_forward(self, x_TD: Tensor) -> None:
        """Add the MLP's output to the residual stream."""
        self.mlp(x_TD, self.normed_again(x_TD))


class _Attention:
    """Latent attention; the first projections of queries and latents are one matrix."""

    def __init__(self, attention: LatentAttention, gain_D: Tensor, dtype: torch.dtype) -> None:
        config, wide = attention.config, gain_D.dtype
        heads, rank, self.rotary = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.latent_norm, self.dtype = _Norm(attention.kv_a_layernorm, wide), dtype
        self.attends = attention_dtype(dtype, gain_D.device)
        expand_HXK = (attention.kv_b_proj.weight.data * self.latent_norm.gain_D).view(heads, -1, rank)
        keys_HNK, values_HVK = expand_HXK.split_with_sizes([config.qk_nope_head_dim, config.v_head_dim], 1)
        self.values_HKV = values_HVK.mT.to(self.attends)
        if config.q_lora_rank is None:
            self.q_norm, first_ID = None, _absorb(attention.q_proj.weight.data, keys_HNK, attention.scale)
        else:
            self.q_norm, first_ID = _Norm(attention.q_a_layernorm, dtype), attention.q_a_proj.weight.data
            absorbed = _absorb(attention.q_b_proj.weight.data, keys_HNK, attention.scale)
            self.q_b = Product((absorbed * self.q_norm.gain_D).to(dtype))
        second_CD = attention.kv_a_proj_with_mqa.weight.data.roll(self.rotary, 0)
        self.split = [len(first_ID), len(second_CD)]
        self.joined = Product((torch.cat([first_ID, second_CD]) * gain_D).to(dtype))
        self.output = Product(attention.o_proj.weight.data.to(dtype))

    def project(self, x_TD: Tensor, heads: _Heads) -> None:
        """Fill `heads`."""
        query, latents_TC = self.joined(x_TD).split_with_sizes(self.split, 1)
        heads.latents_TC.copy_(latents_TC)
        heads.latent_TK.div_(self.latent_norm.length(heads.latent_TK))
        if self.q_norm is not None:
            query = self.q_b(self.q_norm(query.to(heads.latents_TC.dtype)))
        heads.queries_THC.copy_(query.view(heads.queries_THC.shape))
        heads.pairs_THR.mul_(heads.turns_T1R)

    def absorbed(self, x_BD: Tensor, heads: _Heads, past_BLC: Tensor, bias_B1L: Tensor | None) -> None:
        """Add attention of one new token per row over cached latents to `x_BD`."""
        logits_BHL = torch.bmm(heads.queries_THC.to(self.attends), past_BLC.mT)
        if bias_B1L is not None:
            logits_BHL += bias_B1L
        self._add(x_BD, torch.bmm(logits_BHL.softmax(-1), past_BLC[..., self.rotary :]))

    def causal(self, x_TD: Tensor, heads: _Heads, batch: int) -> None:
        """Add attention of whole prompts to `x_TD`, T = batch * length, some queries at a time."""
        queries_BLHC, latents_BLC = (
            part.to(self.attends).reshape(batch, len(x_TD) // batch, *part.shape[1:])
            for part in (heads.queries_THC, heads.latents_TC)
        )
        mixed = []
        for start in range(0, queries_BLHC.shape[1], QUERY_BLOCK):
            part = queries_BLHC[:, start : start + QUERY_BLOCK]
            length = part.shape[1]
            past_BLC = latents_BLC[:, : start + length]
            logits = torch.bmm(part.flatten(1, 2), past_BLC.mT)
            logits.view(batch, length, -1, start + length)[..., start:] += logits.new_full(
                (length, length), -torch.inf
            ).triu_(1)[:, None]
            mixed.append(torch.bmm(logits.softmax(-1), past_BLC[..., self.rotary :]))
        self._add(x_TD, torch.cat(mixed, 1).view(len(x_TD), -1, mixed[0].shape[-1]))

    def _add(self, x_TD: Tensor, mixed_THK: Tensor) -> None:
        values_HTV = torch.bmm(mixed_THK.transpose(0, 1), self.values_HKV)
        values = torch.empty(len(x_TD), self.output.inputs, dtype=self.dtype, device=x_TD.device)
        values.view(len(x_TD), len(values_HTV), -1).copy_(values_HTV.transpose(0, 1))
        x_TD.add_(self.output(values))


def _absorb(query_XI: Tensor, keys_HNK: Tensor, scale: float) -> Tensor:
    """The query projection [H * X, I] into the latent space, scaled, rotary part first: [H * C, I]."""
    heads, content = keys_HNK.shape[:2]
    query_HXI = query_XI.view(heads, -1, query_XI.shape[1]) * scale
    latent_HKI = torch.bmm(keys_HNK.mT, query_HXI[:, :content].to(keys_HNK.dtype))
    return torch.cat([query_HXI[:, content:], latent_HKI], 1).flatten(0, 1)


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision of the cache and of attention over it."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype
