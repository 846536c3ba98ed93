"""Bytes that a micro-batch leaves behind for its backward pass, tensor by tensor what `k2.model` keeps.

Tensors that share memory count once. What `recompute` names is not there, what `fp8_storage` names is there as FP8, and
of the rest all but the tables of routing can be offloaded.
"""

from dataclasses import dataclass
from math import ceil

from k2.config.pretrain import PretrainConfig
from k2.planner.layout import Layout

FLOAT32, INT64, COMPLEX64 = 4, 8, 8
ITEM = {"bfloat16": 2, "float32": 4}
QUERY_BLOCK = 128
"""Queries whose probabilities are one tensor (`k2.model.mla`), with the keys up to its end."""
FP8_TILE = 128
KEPT_LOGITS = 2**26
"""Logits that the loss keeps; of more it computes them again, so many at a time (`k2.model.loss`)."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one micro-batch.

    device: where it is computed.
    host: what offloading takes away.
    """

    device: float
    host: float = 0.0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.device + other.device, self.host + other.host)

    def __rmul__(self, count: int) -> "Kept":
        return Kept(count * self.device, count * self.host)


def layer_kept(config: PretrainConfig, layout: Layout, dense: bool) -> Kept:
    """One layer of the model, a dense one or one with experts."""
    sizes = _Sizes(config, layout)
    stays, tables = (0.0, 0.0) if dense else _routing(config, sizes)
    if "layers" in layout.recompute:
        moves = sizes.values(config.model.hidden_size)
    else:
        moves = _attention(config, sizes) + (_dense(config, sizes) if dense else _mixture(config, sizes))
        stays = tables + stays * layout.offload_activations
    return Kept(stays, moves) if layout.offload_activations else Kept(stays + moves)


def attention_kept(config: PretrainConfig, layout: Layout) -> float:
    """The first half of a layer, wherever it waits."""
    return _attention(config, _Sizes(config, layout))


def mixture_kept(config: PretrainConfig, layout: Layout) -> float:
    """The second half of a layer with experts."""
    return _mixture(config, _Sizes(config, layout))


def head_kept(config: PretrainConfig, layout: Layout) -> float:
    """Last norm, head and loss: input and output of the norm, the head's weight, targets, and the logits if few."""
    sizes, model = _Sizes(config, layout), config.model
    wide = 2 * sizes.values(model.hidden_size) + sizes.cast(model.vocab_size * model.hidden_size)
    tokens = (FLOAT32 + INT64 + 1) * sizes.tokens
    return wide + tokens + (sizes.values(model.vocab_size) if keeps_logits(config, layout) else 0.0)


def keeps_logits(config: PretrainConfig, layout: Layout) -> bool:
    """Whether the loss keeps a micro-batch's logits."""
    return layout.micro_batch_tokens <= KEPT_LOGITS // config.model.vocab_size


class _Sizes:
    """Bytes of tensors with so many values a token."""

    def __init__(self, config: PretrainConfig, layout: Layout) -> None:
        self.layout, self.tokens = layout, layout.micro_batch_tokens
        self.item, self._parameter = ITEM[config.precision], ITEM[config.param_dtype]

    def values(self, width: float) -> float:
        """As they are computed."""
        return self.item * self.tokens * width

    def stored(self, width: int) -> float:
        """What `fp8_storage` is about."""
        narrow = self.tokens * (width + FLOAT32 * ceil(width / FP8_TILE))
        return narrow if self.layout.fp8_storage else self.values(width)

    def gate_up(self, width: int) -> float:
        """SwiGLU's input, of an inner width."""
        return 0.0 if "mlp_up_projections" in self.layout.recompute else self.stored(2 * width)

    def norm(self, width: int, output: float) -> float:
        """A norm's input, one number a row, and its output."""
        kept = self.values(width) + FLOAT32 * self.tokens
        return kept if "norms" in self.layout.recompute else kept + output

    def cast(self, values: int) -> float:
        """Weights in the precision of activations, where they have another one."""
        return 0.0 if self.item == self._parameter else float(self.item * values)


def _attention(config: PretrainConfig, sizes: _Sizes) -> float:
    """Norms, latents, queries, keys and values of every head, probabilities, the output, and tables of rotation."""
    model, context = config.model, config.context_length
    hidden, heads, latent = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    rotary, value, width = model.qk_rope_head_dim, model.v_head_dim, model.qk_head_dim
    kept = sizes.norm(hidden, sizes.values(hidden)) + sizes.norm(latent, sizes.values(latent)) + sizes.values(rotary)
    if model.q_lora_rank is not None:
        kept += sizes.norm(model.q_lora_rank, sizes.values(model.q_lora_rank))
    again = "mla_up_projections" in sizes.layout.recompute
    kept += sizes.values(rotary if again else heads * (2 * width + value))
    if "attention_probabilities" not in sizes.layout.recompute:
        kept += sizes.values(heads * _keys(context))
    return kept + sizes.values(heads * value) + COMPLEX64 * context * rotary


def _keys(context: int) -> float:
    """Keys that a query is compared with, in the mean: those up to the end of its block."""
    ends = [min(start + QUERY_BLOCK, context) for start in range(0, context, QUERY_BLOCK)]
    return sum(end * (end - start) for start, end in zip([0, *ends], ends, strict=False)) / context


def _dense(config: PretrainConfig, sizes: _Sizes) -> float:
    hidden, width = config.model.hidden_size, config.model.intermediate_size
    return sizes.norm(hidden, sizes.values(hidden)) + _gated(sizes, width)


def _gated(sizes: _Sizes, width: int) -> float:
    return FLOAT32 * sizes.tokens + sizes.gate_up(width)


def _routing(config: PretrainConfig, sizes: _Sizes) -> tuple[float, float]:
    """What the layer's results hold of its routing, and its tables: the order of rows."""
    model, tokens = config.model, sizes.tokens
    balance = FLOAT32 * (model.n_routed_experts + 1) * tokens if config.balance_loss_weight > 0 else 0.0
    orders = 3 if sizes.layout.ep == 1 else 6
    return balance, float(orders * INT64 * model.num_experts_per_tok * tokens)


def _mixture(config: PretrainConfig, sizes: _Sizes) -> float:
    """Norm, router, shared experts, and routed ones: their inputs only where they came from other ranks."""
    model, tokens, chosen = config.model, sizes.tokens, config.model.num_experts_per_tok
    hidden, width = model.hidden_size, model.moe_intermediate_size
    kept = sizes.norm(hidden, sizes.stored(hidden))
    weights = FLOAT32 * (chosen + 1) * model.norm_topk_prob
    kept += tokens * (FLOAT32 * model.n_routed_experts + INT64 * chosen + weights)
    if model.n_shared_experts:
        kept += _gated(sizes, width * model.n_shared_experts)
    kept += chosen * (FLOAT32 * tokens + sizes.gate_up(width))
    if sizes.layout.ep > 1:
        kept += chosen * sizes.stored(hidden)
    return kept
