"""What one token costs, and what the weights weigh: the numbers that planner, benchmarks and `k2 model info` share.

Torch-free. Everything is counted from the table of logical tensors.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, get_args

from k2.config.model import ModelConfig
from k2.model.layout import (
    LogicalTensor,
    ParameterCounts,
    cache_values_per_token,
    flops_per_token,
    logical_tensors,
    parameter_counts,
    routed_scaling,
)
from k2.model.storage import Format, weight_bytes

CACHE_BYTES = 2
"""Bytes of one cached value (bfloat16)."""


@dataclass(frozen=True)
class TokenCost:
    """Operations and bytes of one token in a sequence of `context` tokens.

    flops_forward: forward pass, the mean over a causal sequence (`k2.model.layout.flops_per_token`).
    flops_training: forward and backward; each product of the forward pass has two in the backward pass.
    flops_decode: generating the last token with the latent cache and absorbed projections.
    weight_bytes: weights that generating one token reads, its own experts only (batch 1).
    cache_bytes: what the cache keeps for one token, all layers.
    cache_read_bytes: cache that generating the last token reads.
    """

    flops_forward: int
    flops_training: int
    flops_decode: int
    weight_bytes: int
    cache_bytes: int
    cache_read_bytes: int


def token_cost(config: ModelConfig, context: int, form: Format = "bf16") -> TokenCost:
    """Cost of a token with weights stored as `form` and a bfloat16 cache.

    Absorbed decoding multiplies queries with latents instead of keys (DeepSeek-V2, arXiv 2405.04434, appendix C): per
    head, layer and cached token 2 (K + R) operations for the logit and 2 K for the value, K = kv_lora_rank and
    R = qk_rope_head_dim. Folding the projections into query and output costs what they cost otherwise.
    """
    forward = flops_per_token(config, context)
    pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    products = forward - config.num_hidden_layers * pair * (context + 1)
    latent = 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    cache = CACHE_BYTES * config.num_hidden_layers * cache_values_per_token(config)
    layout = [t for t in logical_tensors(config) if t.component != "embed_tokens"]
    routed = weight_bytes((t for t in layout if t.quantized), form)
    rest = weight_bytes((t for t in layout if not t.quantized), form)
    return TokenCost(
        flops_forward=forward,
        flops_training=3 * forward,
        flops_decode=products + config.num_hidden_layers * latent * context,
        weight_bytes=rest + routed * config.num_experts_per_tok // config.n_routed_experts,
        cache_bytes=cache,
        cache_read_bytes=cache * context,
    )


def part_of(tensor: LogicalTensor) -> str:
    """The part of the model a tensor belongs to, as `parameters_by_part` names it."""
    if tensor.layer is None:
        return {"embed_tokens": "embedding", "lm_head": "head"}.get(tensor.component, "norms")
    if len(tensor.shape) == 1 and tensor.group != "none":
        return "norms"
    if "self_attn" in tensor.name:
        return "attention"
    if tensor.component in ("gate", "e_score_correction_bias"):
        return "router"
    kind, _, _ = tensor.component.rpartition(".")
    return {"experts": "routed experts", "shared_experts": "shared experts"}.get(kind, "dense layers")


def parameters_by_part(config: ModelConfig) -> dict[str, ParameterCounts]:
    """Values in each part of the model, and those one token touches."""
    totals: Counter[str] = Counter()
    for tensor in logical_tensors(config):
        totals[part_of(tensor)] += tensor.size
    share = {"routed experts": (config.num_experts_per_tok, config.n_routed_experts)}
    return {
        part: ParameterCounts(total, total * share.get(part, (1, 1))[0] // share.get(part, (1, 1))[1])
        for part, total in totals.items()
    }


def model_info(config: ModelConfig, context: int) -> dict[str, Any]:
    """All of it as JSON: counts, cost of a token, bytes of the weights in every format."""
    layout = logical_tensors(config)
    return {
        "config": config.model_dump(mode="json") | {"routed_scaling_factor": routed_scaling(config)},
        "context": context,
        "parameters": asdict(parameter_counts(config)),
        "parts": {part: asdict(counts) for part, counts in parameters_by_part(config).items()},
        "token": asdict(token_cost(config, context)),
        "weight_bytes": {form: weight_bytes(layout, form) for form in get_args(Format)},
    }
