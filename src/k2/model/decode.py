"""The forward pass of generation: prompts fill the latent cache, then one token per row and step.

Attention runs over the cache itself. Few tokens make a step a matter of operators and of memory traffic, not of
arithmetic; so a weight version is prepared once, as `k2.model.folding` describes. Bfloat16 on a CPU runs through all
layers in C (`k2.kernels.cpu.decode`). What follows here is the same in torch's operators, with a token's latents as one
more head of its queries. The residual stream is at least float32, and on a CPU so is attention over the cache.

Letters in shapes: T tokens, B batch rows, L length, D hidden, H heads, R rotary part of a head, V value width of a head
or vocabulary, K latent rank, C = R + K.
"""

from math import sqrt

import torch
from torch import Tensor

from k2.kernels.cpu.decode import PackedModel, Stepper
from k2.model.backend import runs_in_c
from k2.model.cache import LatentCache
from k2.model.folding import fold_attention, gain, layer_weights
from k2.model.layers import GatedMLP, RMSNorm, upcast
from k2.model.layout import cache_values_per_token, routed_scaling
from k2.model.mixture import DenseMLP, Mixture
from k2.model.mla import LATENT_NORM_EPS, LatentAttention
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
        self.stepper: Stepper | None = None
        if model.packed is not None:
            self.rows_S = torch.arange(rows)
            self.stepper = Stepper(model.packed, self.cache.values_NSLC, torch.view_as_real(self.turns_L1R))

    def prefill(self, tokens_BL: Tensor, rows_B: Tensor) -> None:
        """Store the latents of right-padded prompts in cache rows `rows_B`.

        Causality keeps padding out: it comes after every real token, and decoding overwrites its slots.
        """
        batch, length = tokens_BL.shape
        if self.stepper is not None:
            places = rows_B.repeat_interleave(length), self.slots_L[:length].repeat(batch)
            self.stepper.fill(tokens_BL.flatten(), *places)
            return
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
        if self.stepper is not None:
            return self.stepper.logits(tokens_B, self.rows_S[: len(tokens)], slots_B)
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
        self.norm = _Norm(model.norm, self.dtype)
        head_VD = model.lm_head.weight.data * gain(model.norm, self.dtype)
        layers = (layer for layer in model.layers.values() if isinstance(layer, DecoderLayer))
        self.packed: PackedModel | None = None
        if runs_in_c(self.embedding_VD):
            folded = (layer_weights(layer, self.dtype) for layer in layers)
            constants = {"scaling": routed_scaling(self.config), "latent_eps": LATENT_NORM_EPS}
            self.packed = PackedModel(self.config, folded, self.embedding_VD.contiguous(), head_VD, **constants)
            return
        self.head = Product(head_VD.to(self.dtype))
        self.layers = [_Layer(layer, self.dtype) for layer in layers]

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token numbers to the residual stream [T, D]."""
        return self.embedding_VD.index_select(0, tokens_T).to(self.wide)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Residual stream to logits [T, V], in at least float32."""
        return upcast(self.head(self.norm(x_TD)))


class _Norm:
    """x over its length, in `dtype`."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.floor = norm.weight.new_tensor(
            sqrt(len(norm.weight) * norm.eps), dtype=torch.promote_types(dtype, torch.float32)
        )

    def length(self, x: Tensor) -> Tensor:
        """sqrt(sum of squares + width * eps) of each row."""
        length: Tensor = torch.linalg.vector_norm(x, 2, -1, True)
        return length.hypot_(self.floor)

    def __call__(self, x: Tensor) -> Tensor:
        """From float32 or wider to the precision of products."""
        return torch.div(x, self.length(x)).to(self.dtype)


class _Layer:
    """One decoder layer on tokens [T, D]."""

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype) -> None:
        self.normed, self.normed_again = (
            _Norm(norm, dtype) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.attention = _Attention(layer.self_attn, gain(layer.input_layernorm, dtype), dtype)
        mlp, gain_D = layer.mlp, gain(layer.post_attention_layernorm, dtype)
        self.mlp = DenseMLP(mlp, gain_D, dtype) if isinstance(mlp, GatedMLP) else Mixture(mlp, gain_D, dtype)

    def feed_forward(self, x_TD: Tensor) -> None:
        """Add the MLP's output to the residual stream."""
        self.mlp(x_TD, self.normed_again(x_TD))


class _Attention:
    """Latent attention; the first projections of queries and latents are one matrix."""

    def __init__(self, attention: LatentAttention, gain_D: Tensor, dtype: torch.dtype) -> None:
        self.rotary, wide = attention.config.qk_rope_head_dim, gain_D.dtype
        self.latent_norm, self.q_norm = _Norm(attention.kv_a_layernorm, wide), None
        self.dtype, self.attends = dtype, attention_dtype(dtype, gain_D.device)
        joined_OD, q_b_ZQ, values_HWK = fold_attention(attention, gain_D)
        self.values_HKV = values_HWK.mT.to(self.attends)
        if q_b_ZQ is not None:
            self.q_norm, self.q_b = _Norm(attention.q_a_layernorm, dtype), Product(q_b_ZQ.to(dtype))
        second = cache_values_per_token(attention.config)
        self.split = [len(joined_OD) - second, second]
        self.joined = Product(joined_OD.to(dtype))
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


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision of the cache and of attention over it."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype
