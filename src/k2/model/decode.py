"""The forward pass of generation: prompts fill the latent cache, then one token per row and step.

Decoding never expands keys and values: the query is projected into the latent space and attention runs over
the cache itself (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorption"). Few tokens make a step a matter of
operators and of memory traffic, not of arithmetic; so a weight version is prepared once (projections of the same
input in one matrix, bfloat16 matrices packed for the processor, the rest as ready-made views), and the step works on
plain tensors without modules. Attention over the cache runs in at least float32 on a CPU, which has no fast batched
products in bfloat16.

Letters in shapes: T tokens, B batch rows, L length, D hidden, H heads, X query/key width of a head, N content part
of it, R rotary part of it, V value width of a head or vocabulary, K latent rank, C = K + R, E experts, S choices
per token, F expert hidden, P (token, choice) pairs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from k2.model.cache import LatentCache
from k2.model.layers import GatedMLP, RMSNorm, upcast
from k2.model.mla import LatentAttention
from k2.model.moe import MixtureOfExperts
from k2.model.rope import rotary_tables
from k2.model.transformer import DecoderLayer, Transformer

Product = Callable[[Tensor], Tensor]  # [T, in] -> [T, out]
DENSE_TOKENS, DENSE_EXPERTS = 64, 32  # up to here one packed product over all experts is faster than many


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
        self.cache = LatentCache(config, rows, length, attention_dtype(dtype, device), device)
        self.slots_L = torch.arange(length, device=device)
        self.cos_LR, self.sin_LR = pair_tables(*rotary_tables(config, self.slots_L, self.cache.values_NSLC.dtype))

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
            self.cache.fill(number, rows_B, latents_TC.view(batch, length, -1))
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
        self.embedding_VD, self.head = model.embed_tokens.weight.data, product(model.lm_head.weight)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token numbers to the residual stream [T, D]."""
        return self.embedding_VD.index_select(0, tokens_T)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Residual stream to logits [T, V], in at least float32."""
        return upcast(self.head(self.norm(x_TD)))


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
        self.mlp = _Mixture(mlp) if isinstance(mlp, MixtureOfExperts) else _GatedMLP(mlp)

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        """Add the MLP's output to the residual stream."""
        return self.mlp(x_TD, self.normed_again(x_TD))


class _Attention:
    """Latent attention; the first projections of queries and latents are one matrix."""

    def __init__(self, attention: LatentAttention) -> None:
        config, kv_b = attention.config, attention.kv_b_proj.weight.data
        self.heads, self.rank, self.scale = config.num_attention_heads, config.kv_lora_rank, attention.scale
        self.widths = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        if config.q_lora_rank is None:
            first, self.q_norm = attention.q_proj.weight.data, None
        else:
            first, self.q_norm = attention.q_a_proj.weight.data, _Norm(attention.q_a_layernorm)
            self.q_b = product(attention.q_b_proj.weight)
        self.split = [first.shape[0], self.rank + config.qk_rope_head_dim]
        self.joined = product(torch.cat([first, attention.kv_a_proj_with_mqa.weight.data]))
        self.latent_norm = _Norm(attention.kv_a_layernorm)
        self.dtype = attention_dtype(kv_b.dtype, kv_b.device)
        self.expand_CX = kv_b.to(self.dtype).T
        expand_HXK = kv_b.to(self.dtype).view(self.heads, -1, self.rank)
        self.keys_HNK = expand_HXK[:, : self.widths[0]]
        self.values_HKV = expand_HXK[:, self.widths[0] :].transpose(1, 2)
        self.output = product(attention.o_proj.weight)
        pairs = torch.arange(config.qk_rope_head_dim, device=first.device)
        self.partners = pairs + 1 - 2 * (pairs % 2)

    def project(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries' content [T, H, N] and rotary part [T, H, R], and the latents [T, C] that the cache keeps."""
        query, latents_TC = self.joined(x_TD).split_with_sizes(self.split, dim=1)
        if self.q_norm is not None:
            query = self.q_b(self.q_norm(query))
        latents_TC = latents_TC.to(self.dtype)
        latent = latents_TC[:, : self.rank]
        self.latent_norm(latent, out=latent)
        self._rotate(latents_TC[:, self.rank :], cos_TR, sin_TR)
        content_THN, rotary_THR = (
            query.to(self.dtype).view(len(x_TD), self.heads, -1).split_with_sizes(self.widths, dim=2)
        )
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
        return self.output(values_HBV.transpose(0, 1).flatten(1).to(x_BD.dtype)).add_(x_BD)

    def causal(self, x_TD: Tensor, content: Tensor, rotary: Tensor, latents_TC: Tensor, batch: int) -> Tensor:
        """Attention of whole prompts with expanded keys and values, added to `x_TD`; T = batch * length."""
        length = len(x_TD) // batch
        keys_values = torch.mm(latents_TC[:, : self.rank], self.expand_CX).view(len(x_TD), self.heads, -1)
        key, value = keys_values[..., : self.widths[0]], keys_values[..., self.widths[0] :]
        shared = latents_TC[:, None, self.rank :].expand(-1, self.heads, -1)
        q, k, v = (
            heads.view(batch, length, self.heads, -1).transpose(1, 2)
            for heads in (torch.cat([content, rotary], dim=2), torch.cat([key, shared], dim=2), value.contiguous())
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.output(mixed.transpose(1, 2).reshape(len(x_TD), -1).to(x_TD.dtype)).add_(x_TD)


class _GatedMLP:
    """down(silu(gate) * up), added to the residual stream."""

    def __init__(self, mlp: GatedMLP) -> None:
        self.gate_up, self.down = product(mlp.gate_up_proj.weight), product(mlp.down_proj.weight)

    def __call__(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        return self.down(_gated(self.gate_up(normed_TD))).add_(x_TD)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Mixture:
    """Routed and shared experts.

    Pairs are ordered by expert, and an expert nobody chose is not touched. With few experts and few tokens nearly
    every expert is read anyway; then one product over all experts, unchosen ones weighted zero, saves the ordering.
    """

    def __init__(self, mlp: MixtureOfExperts) -> None:
        self.gate = mlp.gate
        self.shared = None if mlp.shared_experts is None else _GatedMLP(mlp.shared_experts)
        gate_up_EGD, down_EDF = mlp.experts.gate_up_proj.data, mlp.experts.down_proj.data
        self.gate_up = [product(matrix) for matrix in gate_up_EGD]
        self.down = [product(matrix) for matrix in down_EDF]
        self.dense_tokens = DENSE_TOKENS if packs(down_EDF) and len(down_EDF) <= DENSE_EXPERTS else 0
        if self.dense_tokens:
            self._join(gate_up_EGD, down_EDF, mlp.shared_experts)

    def _join(self, gate_up_EGD: Tensor, down_EDF: Tensor, shared: GatedMLP | None) -> None:
        """All experts in two matrices; a shared expert is one that every token chooses with weight one."""
        experts, hidden, width = down_EDF.shape
        weights_E = down_EDF.new_zeros(experts)
        if shared is not None:
            shared_EGD = shared.gate_up_proj.weight.view(2, -1, width, hidden).transpose(0, 1).flatten(1, 2)
            shared_EDF = shared.down_proj.weight.view(hidden, -1, width).transpose(0, 1)
            gate_up_EGD, down_EDF = torch.cat([gate_up_EGD, shared_EGD]), torch.cat([down_EDF, shared_EDF])
            weights_E = torch.cat([weights_E, weights_E.new_ones(len(shared_EDF))])
        self.weights_1E = weights_E[None]
        self.all_gate_up = product(gate_up_EGD.flatten(0, 1))
        self.all_down = product(down_EDF.transpose(0, 1).flatten(1))

    def __call__(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        routing = self.gate(normed_TD)
        mix = self._dense if len(x_TD) <= self.dense_tokens else self._ordered
        return mix(normed_TD, routing.experts_TS, routing.weights_TS.to(normed_TD.dtype)).add_(x_TD)

    def _dense(self, normed_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor) -> Tensor:
        weights_TE = self.weights_1E.repeat(len(normed_TD), 1).scatter_(1, experts_TS, weights_TS)
        inner_TEF = _gated(self.all_gate_up(normed_TD).view(*weights_TE.shape, -1)).mul_(weights_TE[:, :, None])
        return self.all_down(inner_TEF.flatten(1))

    def _ordered(self, normed_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor) -> Tensor:
        chosen_P = experts_TS.flatten()
        order_P = chosen_P.argsort(stable=True)
        counts = torch.bincount(chosen_P, minlength=len(self.down)).tolist()
        rows = normed_TD.index_select(0, order_P // experts_TS.shape[1])
        outputs = _segments(_gated(_segments(rows, self.gate_up, counts)), self.down, counts)
        places_TS = order_P.argsort().view_as(experts_TS)
        mixed_TD = F.embedding_bag(places_TS, outputs, mode="sum", per_sample_weights=weights_TS)
        return mixed_TD if self.shared is None else self.shared(mixed_TD, normed_TD)


def _segments(rows: Tensor, matrices: list[Product], counts: list[int]) -> Tensor:
    """Each run of `counts[e]` rows times matrix e."""
    pieces = zip(rows.split_with_sizes(counts), matrices, counts, strict=True)
    return torch.cat([matrix(piece) for piece, matrix, count in pieces if count])


def product(weight_OI: Tensor) -> Product:
    """Multiplication with the transpose of a weight [out, in].

    Packed bfloat16 weights are read at twice the speed of plain ones, and save the library's own repacking.
    """
    if packs(weight_OI):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
        arguments = {"W": packed, "B": None, "attr": "none", "scalars": [], "algorithm": ""}
        return partial(torch.ops.mkldnn._linear_pointwise.default, **arguments)
    return partial(torch.mm, mat2=weight_OI.detach().T)


def packs(weight: Tensor) -> bool:
    """Whether products with such a weight read it packed."""
    packing: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return packing and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision of the cache and of attention over it."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def pair_tables(cos_LR: Tensor, sin_LR: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of half the rotary width to full width: the cosine twice, the sine negative and positive."""
    return cos_LR.repeat_interleave(2, -1), torch.stack([-sin_LR, sin_LR], -1).flatten(-2)
