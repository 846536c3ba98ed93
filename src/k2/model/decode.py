"""The forward pass of generation: prompts fill the latent cache, then one token per row and step.

Decoding never expands keys and values: the query is projected into the latent space and attention runs over
the cache itself (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorption"). Few tokens make a step a matter of
operators, not of arithmetic; so a weight version is prepared once (projections of the same input in one matrix,
transposes and expert slices as ready-made views), and the step works on plain tensors without modules.

Letters in shapes: T tokens, B batch rows, L length, D hidden, H heads, X query/key width of a head, N content part
of it, R rotary part of it, V value width of a head or vocabulary, K latent rank, C = K + R, E experts, S choices
per token, F expert hidden, P (token, choice) pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from k2.model.cache import LatentCache
from k2.model.layers import GatedMLP, RMSNorm, upcast
from k2.model.mla import LatentAttention
from k2.model.moe import MixtureOfExperts
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


class Decoder:
    """A resident model prepared for generation, the latent cache of `rows` sequences, and rotary tables."""

    def __init__(self, model: "Prepared", rows: int, length: int) -> None:
        config, dtype, device = model.config, model.dtype, model.device
        self.model = model
        self.cache = LatentCache(config, rows, length, dtype, device)
        self.slots_L = torch.arange(length, device=device)
        self.cos_LR, self.sin_LR = pair_tables(*rotary_tables(config, self.slots_L, dtype))

    def prefill(self, tokens_BL: Tensor, rows_B: Tensor) -> None:
        """Store the latents of right-padded prompts in cache rows `rows_B`.

        Causality keeps padding out: it comes after every real token, and decoding overwrites its slots.
        """
        batch, length = tokens_BL.shape
        cos_TR, sin_TR = (table[:length].repeat(batch, 1) for table in (self.cos_LR, self.sin_LR))
        x_TD = self.model.embed(tokens_BL.flatten())
        last = len(self.model.layers) - 1
        for number, layer in enumerate(self.model.layers):
            content_THN, rotary_THR, latents_TC = layer.attention.project(layer.normed(x_TD), cos_TR, sin_TR)
            self.cache.fill(number, rows_B, latents_TC.unflatten(0, (batch, length)))
            if number < last:
                x_TD = layer.attention.causal(x_TD, content_THN, rotary_THR, latents_TC, batch)
                x_TD = layer.feed_forward(x_TD)

    def step(self, tokens_B: Tensor, slots_B: Tensor, longest: int) -> Tensor:
        """Put row b's token into slot `slots_B[b]` (all below `longest`); logits [B, V] of the tokens that follow."""
        cos_BR, sin_BR = self.cos_LR[slots_B], self.sin_LR[slots_B]
        later_BL = self.slots_L[:longest] > slots_B[:, None]
        bias_B1L = cos_BR.new_zeros(later_BL.shape).masked_fill_(later_BL, -torch.inf)[:, None]
        places_B = self.cache.places(slots_B)
        x_BD = self.model.embed(tokens_B)
        for number, layer in enumerate(self.model.layers):
            content_BHN, rotary_BHR, latents_BC = layer.attention.project(layer.normed(x_BD), cos_BR, sin_BR)
            past_BLC = self.cache.append(number, places_B, latents_BC)[:, :longest]
            x_BD = layer.attention.absorbed(x_BD, content_BHN, rotary_BHR, past_BLC, bias_B1L)
            x_BD = layer.feed_forward(x_BD)
        return self.model.logits(x_BD)


class Prepared:
    """The weights of a resident model as the step wants them; to be made anew when the weights change."""

    def __init__(self, model: Transformer) -> None:
        assert model.embed_tokens is not None, "generation needs the whole model"
        assert model.norm is not None
        assert model.lm_head is not None
        self.config, self.dtype, self.device = model.config, model.compute_dtype, model.embed_tokens.weight.device
        self.layers = [_Layer(layer) for layer in model.layers.values() if isinstance(layer, DecoderLayer)]
        self.norm = _Norm(model.norm)
        self.embedding_VD, self.head_DV = model.embed_tokens.weight.data, model.lm_head.weight.data.T

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token numbers to the residual stream [T, D]."""
        return self.embedding_VD.index_select(0, tokens_T)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Residual stream to logits [T, V], in at least float32."""
        return upcast(torch.mm(self.norm(x_TD), self.head_DV))


class _Norm:
    """RMSNorm in few operators: the norm of a row is one kernel, in at least float32."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight = norm.weight.data
        self.wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.eps = torch.tensor(norm.eps, dtype=self.wide, device=self.weight.device)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=self.wide)
        scale = torch.addcmul(self.eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x) if out is None else out).mul_(self.weight)


class _Layer:
    """One decoder layer on tokens [T, D]."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.normed = _Norm(layer.input_layernorm)
        self.attention = _Attention(layer.self_attn)
        self.normed_again = _Norm(layer.post_attention_layernorm)
        mlp = layer.mlp
        self.mlp = _GatedMLP(mlp) if isinstance(mlp, GatedMLP) else _Mixture(mlp)  # type: ignore[arg-type]

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        """Add the MLP's output to the residual stream."""
        return self.mlp(x_TD, self.normed_again(x_TD))


class _Attention:
    """Latent attention. Weights are views of the module's, but for the joined first projections."""

    def __init__(self, attention: LatentAttention) -> None:
        config = attention.config
        self.heads, self.rank, self.scale = config.num_attention_heads, config.kv_lora_rank, attention.scale
        self.widths = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        if config.q_lora_rank is None:
            first, self.q_norm = attention.q_proj.weight.data, None
        else:
            first, self.q_norm = attention.q_a_proj.weight.data, _Norm(attention.q_a_layernorm)
            self.q_b = attention.q_b_proj.weight.data.T
        self.split = [first.shape[0], self.rank + config.qk_rope_head_dim]
        self.joined = torch.cat([first, attention.kv_a_proj_with_mqa.weight.data]).T
        self.latent_norm = _Norm(attention.kv_a_layernorm)
        self.kv_b = attention.kv_b_proj.weight.data.T
        expand_HXK = attention.kv_b_proj.weight.data.view(self.heads, -1, self.rank)
        self.keys_HNK, values_HVK = expand_HXK.split([self.widths[0], config.v_head_dim], dim=1)
        self.values_HKV = values_HVK.transpose(1, 2)
        self.output = attention.o_proj.weight.data.T
        pairs = torch.arange(config.qk_rope_head_dim, device=first.device)
        self.partners = pairs + 1 - 2 * (pairs % 2)

    def project(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries' content [T, H, N] and rotary part [T, H, R], and the latents [T, C] that the cache keeps."""
        query, latents_TC = torch.mm(x_TD, self.joined).split(self.split, dim=1)
        if self.q_norm is not None:
            query = torch.mm(self.q_norm(query), self.q_b)
        content_THN, rotary_THR = query.unflatten(1, (self.heads, -1)).split(self.widths, dim=2)
        latent, rotary_TR = latents_TC[:, : self.rank], latents_TC[:, self.rank :]
        self.latent_norm(latent, out=latent)
        self._rotate(rotary_TR, cos_TR, sin_TR)
        self._rotate(rotary_THR, cos_TR[:, None], sin_TR[:, None])
        return content_THN, rotary_THR, latents_TC

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate interleaved pairs in place: each member times the cosine, plus its partner times the signed sine."""
        partner = x.index_select(-1, self.partners)
        x.mul_(cos).addcmul_(partner, sin)

    def absorbed(self, x_BD: Tensor, content: Tensor, rotary: Tensor, past_BLC: Tensor, bias_B1L: Tensor) -> Tensor:
        """Attention of one new token per row over cached latents, added to `x_BD`."""
        in_latent_HBK = torch.bmm(content.transpose(0, 1), self.keys_HNK)
        query_BHC = torch.cat([in_latent_HBK.transpose(0, 1), rotary], dim=-1)
        logits_BHL = torch.baddbmm(bias_B1L, query_BHC, past_BLC.transpose(1, 2), alpha=self.scale)
        mixed_BHK = torch.bmm(torch.softmax(logits_BHL, -1), past_BLC[..., : self.rank])
        values_HBV = torch.bmm(mixed_BHK.transpose(0, 1), self.values_HKV)
        return torch.addmm(x_BD, values_HBV.transpose(0, 1).flatten(1), self.output)

    def causal(self, x_TD: Tensor, content: Tensor, rotary: Tensor, latents_TC: Tensor, batch: int) -> Tensor:
        """Attention of whole prompts with expanded keys and values, added to `x_TD`; T = batch * length."""
        shape = (batch, -1, self.heads)
        keys_values = torch.mm(latents_TC[:, : self.rank], self.kv_b).unflatten(1, (self.heads, -1))
        key, value = keys_values.split([self.widths[0], self.values_HKV.shape[2]], dim=2)
        shared = latents_TC[:, None, self.rank :].expand(-1, self.heads, -1)
        q = torch.cat([content, rotary], dim=2).unflatten(0, shape[:2]).transpose(1, 2)
        k = torch.cat([key, shared], dim=2).unflatten(0, shape[:2]).transpose(1, 2)
        v = value.unflatten(0, shape[:2]).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return torch.addmm(x_TD, mixed.transpose(1, 2).flatten(2).flatten(0, 1), self.output)


class _GatedMLP:
    """down(silu(gate) * up), added to the residual stream."""

    def __init__(self, mlp: GatedMLP) -> None:
        self.gate_up, self.down = mlp.gate_up_proj.weight.data.T, mlp.down_proj.weight.data.T

    def __call__(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        return torch.addmm(x_TD, _gated(torch.mm(normed_TD, self.gate_up)), self.down)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Mixture:
    """Routed and shared experts. Pairs are ordered by expert; an expert nobody chose is not touched."""

    def __init__(self, mlp: MixtureOfExperts) -> None:
        self.gate = mlp.gate
        self.shared = None if mlp.shared_experts is None else _GatedMLP(mlp.shared_experts)
        self.gate_up = mlp.experts.gate_up_proj.data.transpose(1, 2).unbind(0)
        self.down = mlp.experts.down_proj.data.transpose(1, 2).unbind(0)

    def __call__(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        routing = self.gate(normed_TD)
        x_TD = x_TD if self.shared is None else self.shared(x_TD, normed_TD)
        chosen_P = routing.experts_TS.flatten()
        order_P = chosen_P.argsort(stable=True)
        counts = torch.bincount(chosen_P, minlength=len(self.down)).tolist()
        rows = normed_TD.index_select(0, order_P // routing.experts_TS.shape[1])
        outputs = _segments(_gated(_segments(rows, self.gate_up, counts)), self.down, counts)
        places_TS = order_P.argsort().view_as(routing.experts_TS)
        weights_TS = routing.weights_TS.to(outputs.dtype)
        return x_TD + F.embedding_bag(places_TS, outputs, mode="sum", per_sample_weights=weights_TS)


def _segments(rows: Tensor, matrices: tuple[Tensor, ...], counts: list[int]) -> Tensor:
    """Each run of `counts[e]` rows times matrix e."""
    output = rows.new_empty(rows.shape[0], matrices[0].shape[1])
    pieces = zip(rows.split_with_sizes(counts), matrices, output.split_with_sizes(counts), counts, strict=True)
    for piece, matrix, target, count in pieces:
        if count:
            torch.mm(piece, matrix, out=target)
    return output


def pair_tables(cos_LR: Tensor, sin_LR: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of half the rotary width to full width: the cosine twice, the sine negative and positive."""
    return cos_LR.repeat_interleave(2, -1), torch.stack([-sin_LR, sin_LR], -1).flatten(-2)
