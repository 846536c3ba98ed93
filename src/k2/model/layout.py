"""The one table of the model's tensors: names, shapes, who optimises them, what is clipped, sharded, quantised.

Torch-free. Optimizer, QK-Clip, import and export, the INT4 ignore list, resharding and the planner read it;
nobody else matches names.

Internal parameters may be fused for speed: the routed experts of a layer are two stacked parameters,
`gate_up_proj [E, 2F, D]` and `down_proj [E, D, F]`, and gate and up of every MLP are one matrix. A
`LogicalTensor` is one tensor of a Hugging Face checkpoint and says which part of which parameter it is.

Letters in shapes: D hidden, H heads, E experts, F expert hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import exp, floor, prod, sqrt
from random import Random
from statistics import NormalDist
from typing import Any, Literal

from k2.config.model import ModelConfig

Group = Literal["muon", "adamw", "none"]


@dataclass(frozen=True)
class HeadRows:
    """How the rows of a projection divide into heads, for QK-Clip (Kimi K2 report, section 2.1).

    Head h owns rows `[h * per_head, (h + 1) * per_head)`. Of these the first `content` rows are scaled by
    sqrt(gamma_h), the next `rotary` rows by gamma_h, and the rest (values) stay as they are.
    """

    heads: int
    per_head: int
    content: int
    rotary: int


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the model as Hugging Face's checkpoint format names it.

    name: name in a checkpoint, one tensor per expert and per gate or up projection.
    parameter: name in `Transformer.state_dict()`; `parameter[index][rows]` is this tensor.
    index: expert within a stacked parameter, or None.
    rows: rows of a fused matrix, or None for all.
    shape: shape of this tensor, not of the parameter.
    group: which optimizer owns it; "none" is the router's selection bias, which a rule updates.
    layer: layer number, or None outside the layers.
    component: the projection's short name, such as "q_b_proj" or "experts.gate_proj".
    head_rows: set where QK-Clip scales rows.
    shard_axis: axis of the parameter that expert parallelism divides, or None.
    quantized: whether INT4 export packs it; only routed experts.
    start: its first row here, where ranks divide it by rows; `shape` is then that of the part.
    """

    name: str
    parameter: str
    index: tuple[int, ...] | None
    rows: slice | None
    shape: tuple[int, ...]
    group: Group
    layer: int | None
    component: str
    head_rows: HeadRows | None = None
    shard_axis: int | None = None
    quantized: bool = False
    start: int = 0

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def of(self, parameter: Any) -> Any:
        """The view of a parameter that this names."""
        piece = parameter if self.index is None else parameter[self.index]
        return piece if self.rows is None else piece[self.rows]


def logical_tensors(config: ModelConfig) -> list[LogicalTensor]:
    """Every tensor of the model, in checkpoint order."""
    return list(_table(config))


@lru_cache(maxsize=4)
def _table(config: ModelConfig) -> tuple[LogicalTensor, ...]:
    vocab, hidden = config.vocab_size, config.hidden_size
    tensors = [_plain("model.embed_tokens.weight", (vocab, hidden), "adamw", None)]
    for layer in range(config.num_hidden_layers):
        tensors += _norm(layer, "input_layernorm", hidden)
        tensors += _attention(config, layer)
        tensors += _norm(layer, "post_attention_layernorm", hidden)
        tensors += _dense(config, layer) if layer < config.first_k_dense_replace else _mixture(config, layer)
    tensors.append(_plain("model.norm.weight", (hidden,), "adamw", None))
    tensors.append(_plain("lm_head.weight", (vocab, hidden), "adamw", None))
    return tuple(tensors)


def _plain(
    name: str, shape: tuple[int, ...], group: Group, layer: int | None, head_rows: HeadRows | None = None
) -> LogicalTensor:
    """A tensor that is a whole parameter of its own."""
    parameter = name.removeprefix("model.")
    component = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return LogicalTensor(name, parameter, None, None, shape, group, layer, component, head_rows)


def _norm(layer: int, component: str, width: int) -> list[LogicalTensor]:
    return [_plain(f"model.layers.{layer}.{component}.weight", (width,), "adamw", layer)]


def _attention(config: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query_rows = HeadRows(heads, nope + rope, nope, rope)
    key_value_rows = HeadRows(heads, nope + value, nope, 0)
    prefix = f"model.layers.{layer}.self_attn."

    def matrix(component: str, rows: int, columns: int, head_rows: HeadRows | None = None) -> LogicalTensor:
        return _plain(f"{prefix}{component}.weight", (rows, columns), "muon", layer, head_rows)

    if config.q_lora_rank is None:
        yield matrix("q_proj", heads * (nope + rope), hidden, query_rows)
    else:
        yield matrix("q_a_proj", config.q_lora_rank, hidden)
        yield from _norm(layer, "self_attn.q_a_layernorm", config.q_lora_rank)
        yield matrix("q_b_proj", heads * (nope + rope), config.q_lora_rank, query_rows)
    yield matrix("kv_a_proj_with_mqa", config.kv_lora_rank + rope, hidden)
    yield from _norm(layer, "self_attn.kv_a_layernorm", config.kv_lora_rank)
    yield matrix("kv_b_proj", heads * (nope + value), config.kv_lora_rank, key_value_rows)
    yield matrix("o_proj", hidden, heads * value)


def _gated(
    layer: int, block: str, parameter: str, width: int, hidden: int, expert: int | None = None
) -> Iterator[LogicalTensor]:
    """The three matrices of one gated MLP, of which gate and up share the parameter `gate_up_proj`."""
    index = None if expert is None else (expert,)
    suffix = ".weight" if expert is None else ""
    kind = "experts." if expert is not None else "shared_experts." if "shared" in block else ""
    parts: list[tuple[str, str, slice | None, tuple[int, int]]] = [
        ("gate_proj", "gate_up_proj", slice(0, width), (width, hidden)),
        ("up_proj", "gate_up_proj", slice(width, 2 * width), (width, hidden)),
        ("down_proj", "down_proj", None, (hidden, width)),
    ]
    for component, fused, rows, shape in parts:
        yield LogicalTensor(
            name=f"model.layers.{layer}.{block}.{component}.weight",
            parameter=f"layers.{layer}.{parameter}.{fused}{suffix}",
            index=index,
            rows=rows,
            shape=shape,
            group="muon",
            layer=layer,
            component=kind + component,
            shard_axis=None if expert is None else 0,
            quantized=expert is not None,
        )


def _dense(config: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    return _gated(layer, "mlp", "mlp", config.intermediate_size, config.hidden_size)


def _mixture(config: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    gate = f"model.layers.{layer}.mlp.gate"
    yield _plain(f"{gate}.weight", (experts, hidden), "muon", layer)
    yield _plain(f"{gate}.e_score_correction_bias", (experts,), "none", layer)
    for expert in range(experts):
        yield from _gated(layer, f"mlp.experts.{expert}", "mlp.experts", width, hidden, expert)
    if config.n_shared_experts:
        shared = "mlp.shared_experts"
        yield from _gated(layer, shared, shared, width * config.n_shared_experts, hidden)


@dataclass(frozen=True)
class ParameterCounts:
    """Values in the model and values one token touches (both embeddings included)."""

    total: int
    active: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count values, the router's selection biases included (1,026,408,232,448 and 32,861,500,928 for Kimi K2)."""
    tensors = logical_tensors(config)
    routed = sum(tensor.size for tensor in tensors if tensor.quantized)
    total = sum(tensor.size for tensor in tensors)
    return ParameterCounts(total, total - routed + routed * config.num_experts_per_tok // config.n_routed_experts)


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Floating-point operations of the forward pass for one token; training costs three times this.

    Two operations per weight of every matrix a token is multiplied with (the embedding is a look-up), and
    two per query-key and attention-value product over the (context + 1) / 2 tokens a causal token sees on
    average in a sequence of `context` tokens. Element-wise work is left out.
    """
    matrices = [t for t in logical_tensors(config) if len(t.shape) == 2 and t.component != "embed_tokens"]
    routed = sum(tensor.size for tensor in matrices if tensor.quantized)
    weights = sum(tensor.size for tensor in matrices) - routed
    weights += routed * config.num_experts_per_tok // config.n_routed_experts
    pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2 * weights + config.num_hidden_layers * pair * (context + 1)


def cache_values_per_token(config: ModelConfig) -> int:
    """Values the latent cache keeps for one token in one layer (576 for Kimi K2)."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def routed_scaling(config: ModelConfig) -> float:
    """Multiplier of the routed experts' output: the configured one, or the one derived from the expert counts."""
    if config.routed_scaling_factor is not None:
        return config.routed_scaling_factor
    return derived_scaling(config.n_routed_experts, config.num_experts_per_tok)


@lru_cache
def derived_scaling(experts: int, chosen: int, draws: int = 4000) -> float:
    """Mean of 1/||p||_2 over Gaussian router logits, p the renormalised top scores, cut to three decimals.

    Moonlight (arXiv 2502.16982), appendix C: the factor that gives the routed output the RMS of a dense MLP.
    (384, 8) gives Kimi K2's 2.827 and (64, 6) Moonlight's 2.446. The largest scores are drawn directly as
    descending uniform order statistics, so the cost does not depend on the number of experts.
    """
    random, normal = Random(0), NormalDist()

    def draw() -> float:
        uniform, scores = 1.0, []
        for remaining in range(experts, experts - chosen, -1):
            uniform *= (1.0 - random.random()) ** (1.0 / remaining)
            scores.append(1.0 / (1.0 + exp(-normal.inv_cdf(min(max(uniform, 1e-12), 1.0 - 1e-12)))))
        return sum(scores) / sqrt(sum(score * score for score in scores))

    return floor(1000 * sum(draw() for _ in range(draws)) / draws + 1e-6) / 1000
