"""The Kimi K2 transformer: DeepSeek-V3's blocks, or a range of them as one pipeline stage.

Letters in shapes: B batch, L length, D hidden, H heads, E experts, V vocabulary, N layers, M MoE layers.
"""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from k2.config.model import ModelConfig, Recompute
from k2.kernels.cpu import spare
from k2.model.activations import Activations, drop_it
from k2.model.attention import AttentionContext
from k2.model.initial import draw
from k2.model.layers import GatedMLP, Linear, RMSNorm
from k2.model.layout import logical_tensors
from k2.model.loss import token_log_probs
from k2.model.mla import LatentAttention, attention_context
from k2.model.moe import Experts, MixtureOfExperts, Routing, WeightTransform, balance_loss
from k2.model.offload import Offload


@dataclass(frozen=True)
class Statistics:
    """What one forward pass measured.

    max_logits_NH: largest attention logit of each layer and head (QK-Clip).
    expert_counts_ME: tokens each expert of each MoE layer received (balancing).
    balance_loss: DeepSeek-V3's sequence-wise loss, mean over MoE layers; zero when there is none.
    """

    max_logits_NH: Tensor
    expert_counts_ME: Tensor
    balance_loss: Tensor


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream; what they leave behind is up to `activations`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)
        self._activations: Activations | None = None
        self._whole = False

    def keep_less(
        self, recompute: Collection[Recompute], fp8_storage: bool, offload: Offload | None, before: Activations | None
    ) -> Activations:
        """Save memory from here on; `before` is what this returned for the layer before."""
        self._activations = memory = Activations(offload, before)
        self._whole = "layers" in recompute
        for module in () if self._whole else self.modules():
            if isinstance(module, RMSNorm) and "norms" in recompute:
                module.call = memory.call
            if isinstance(module, LatentAttention) and "mla_up_projections" in recompute:
                module.call = memory.call
            if isinstance(module, LatentAttention) and "attention_probabilities" in recompute:
                module.keep_probabilities = drop_it
            if isinstance(module, MixtureOfExperts | Experts) and fp8_storage:
                module.keep_input = memory.compress
            if isinstance(module, GatedMLP | Experts) and fp8_storage:
                module.keep_gate_up = memory.compress
            if isinstance(module, GatedMLP | Experts) and "mlp_up_projections" in recompute:
                module.keep_gate_up = drop_it
        return memory

    def forward(self, x_BLD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Routing | None]:
        """New residual stream, largest logit per head [H], and the routing of an MoE layer."""
        with nullcontext() if self._activations is None else self._activations.around(self.parameters()):
            # Statistics are returned, not stored: a recomputed layer cannot count its tokens twice.
            if self._whole and torch.is_grad_enabled():
                whole: tuple[Tensor, Tensor, Routing | None] = checkpoint(
                    partial(self._block, context=context), x_BLD, use_reentrant=False
                )
                return whole
            return self._block(x_BLD, context)

    def _block(self, x_BLD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Routing | None]:
        attended, max_H = self.self_attn(self.input_layernorm(x_BLD), context)
        x_BLD, routing = self.feed_forward(x_BLD + attended)
        return x_BLD, max_H, routing

    def feed_forward(self, x_BLD: Tensor) -> tuple[Tensor, Routing | None]:
        """The second half: residual stream after attention to residual stream after the MLP."""
        normed = self.post_attention_layernorm(x_BLD)
        if isinstance(self.mlp, GatedMLP):
            return x_BLD + self.mlp(normed), None
        mixed, routing = self.mlp(normed)
        return x_BLD + mixed, routing


class Transformer(nn.Module):
    """The model, or the slice `layers` of it: the first slice embeds, the last one has the final norm and head.

    Weights keep the precision they have (float32 masters by default); `compute_dtype` is what activations and
    matrix products use. For the backward pass `recompute` names what is computed again instead of kept, `fp8_storage`
    keeps the inputs of MoE up-projections and SwiGLU as FP8, `offload_activations` keeps what is left on the host.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        layers: range | None = None,
        recompute: Collection[Recompute] = (),
        fp8_storage: bool = False,
        offload_activations: bool = False,
    ) -> None:
        super().__init__()
        numbers = range(config.num_hidden_layers) if layers is None else layers
        self.config, self.compute_dtype = config, compute_dtype
        self.embed_tokens = Linear(config.hidden_size, config.vocab_size) if numbers.start == 0 else None
        blocks = {str(number): DecoderLayer(config, number) for number in numbers}
        self.layers = nn.ModuleDict(blocks)
        last = numbers.stop == config.num_hidden_layers
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if last else None
        self.lm_head = Linear(config.hidden_size, config.vocab_size) if last else None
        self.offload = Offload() if offload_activations else None
        before = None
        for layer in blocks.values() if recompute or fp8_storage or offload_activations else ():
            before = layer.keep_less(recompute, fp8_storage, self.offload, before)

    def initialize(self, seed: int) -> "Transformer":
        """Draw this model's weights, or those of the layers it has: `k2.model.initial.draw`."""
        draw(self.state_dict(), logical_tensors(self.config), seed, self.config.initializer_range)
        return self

    def narrow(self) -> "Transformer":
        """Round the weights to bfloat16; their gradients are summed in float32 (Kimi K2 report, section 2.4)."""
        for parameter in self.parameters():
            parameter.data = parameter.data.bfloat16()
            parameter.grad_dtype = torch.float32
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; on a CPU the next ones are written into their memory."""
        with spare.left():
            super().zero_grad(set_to_none)

    def forward(
        self,
        inputs: Tensor,
        *,
        positions_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        with_balance_loss: bool = False,
    ) -> tuple[Tensor, Statistics]:
        """Tokens [B, L], or hidden states [B, L, D] from the slice before, to hidden states and statistics.

        The last slice's hidden states are final-normed: `logits`, `log_probs` and `loss` take them.
        `documents_BL` numbers the documents of packed rows, which do not see each other; `keep_BL` is False on
        padding. Padding is excluded from attention and from its statistics, not from expert counts.
        """
        x_BLD = inputs if self.embed_tokens is None else self.embed(inputs)
        context = attention_context(self.config, x_BLD[..., 0], self.compute_dtype, positions_BL, documents_BL, keep_BL)
        maxima, routings = [], []
        for layer in self.layers.values():
            x_BLD, max_H, routing = layer(x_BLD, context)
            maxima.append(max_H)
            routings += [routing] if routing is not None else []
        statistics = self._statistics(maxima, routings, x_BLD.shape[0] if with_balance_loss else None)
        return (x_BLD if self.norm is None else self.norm(x_BLD)), statistics

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Tokens [B, L] to the residual stream [B, L, D]."""
        assert self.embed_tokens is not None
        return F.embedding(tokens_BL, self.embed_tokens.weight).to(self.compute_dtype)

    def _statistics(self, maxima: list[Tensor], routings: list[Routing], sequences: int | None) -> Statistics:
        experts = self.config.n_routed_experts
        counts = [torch.bincount(routing.experts_TS.flatten(), minlength=experts) for routing in routings]
        zero = maxima[0].new_zeros(())
        loss = zero
        if sequences is not None and routings:
            loss = torch.stack([balance_loss(routing, sequences) for routing in routings]).mean()
        empty = torch.zeros(0, experts, dtype=torch.int64, device=zero.device)
        return Statistics(torch.stack(maxima), torch.stack(counts) if counts else empty, loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in compute precision; for few tokens, such as the last ones when sampling."""
        result: Tensor = self._head(hidden)
        return result

    @property
    def _head(self) -> Linear:
        assert self.lm_head is not None, "only the last pipeline stage has logits"
        return self.lm_head

    def log_probs(self, hidden_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        """Natural-log probability [B, L] of each target token, differentiable, in at least float32."""
        flat_T = token_log_probs(hidden_BLD.flatten(0, -2), self._head.weight, targets_BL.flatten())
        return flat_T.view_as(targets_BL)

    def loss(self, hidden_BLD: Tensor, targets_BL: Tensor, weights_BL: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, the mean over tokens weighted by `weights_BL` (default: all ones).

        `targets_BL[b, i]` is the token that follows position i. Weights must not all be zero.
        """
        log_probs_BL = self.log_probs(hidden_BLD, targets_BL)
        if weights_BL is None:
            return -log_probs_BL.mean()
        return -(log_probs_BL * weights_BL).sum() / weights_BL.sum()

    def experts(self) -> list[Experts]:
        """The routed experts of this slice's MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, Experts)]

    def set_weight_transform(self, transform: WeightTransform | None) -> None:
        """Pass every routed expert weight through `transform` in the forward pass (INT4-aware training)."""
        for experts in self.experts():
            experts.weight_transform = transform
