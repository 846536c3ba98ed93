"""Bytes on the fullest rank, by component.

States follow ZeRO-1: bfloat16 parameters and float32 gradients on every rank that computes with them, float32 masters
and optimizer states divided over the ranks that hold the same parameters (Moonlight, arXiv 2502.16982, section 2.3).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from k2.config.model import ModelConfig
from k2.model.layout import logical_tensors
from k2.planner.layout import Layout, layers_of_chunks, layers_of_rank

PARAMETER, GRADIENT, MASTER, MOMENT = 2, 4, 4, 4
BF16, FP32, FP8 = 2, 4, 1 + 4 / 128
"""Bytes of a value; FP8 with its share of a float32 scale for 128 values."""
LOSS_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once; the loss is computed in chunks."""


@dataclass(frozen=True)
class Sizes:
    """Values of one layer, or of embedding or head: routed experts, other Muon matrices, what AdamW updates."""

    routed: int = 0
    shared: int = 0
    adamw: int = 0

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(self.routed + other.routed, self.shared + other.shared, self.adamw + other.adamw)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. `host`: what was offloaded, on the rank's share of its node."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    host: float

    @property
    def gpu(self) -> float:
        """Bytes on the GPU, the reserve left out."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers

    def as_dict(self) -> dict[str, float]:
        """Components and their sum."""
        return asdict(self) | {"gpu": self.gpu}


@lru_cache(maxsize=4)
def layer_sizes(model: ModelConfig) -> dict[str | int, Sizes]:
    """Sizes of every layer, of `embedding` and of `head` (with the last norm)."""
    found: dict[str | int, Sizes] = defaultdict(Sizes)
    for tensor in logical_tensors(model):
        outside = "embedding" if tensor.component == "embed_tokens" else "head"
        part = outside if tensor.layer is None else tensor.layer
        found[part] += Sizes(
            routed=tensor.size if tensor.quantized else 0,
            shared=tensor.size if tensor.group == "muon" and not tensor.quantized else 0,
            adamw=tensor.size if tensor.group != "muon" else 0,
        )
    return dict(found)


def stage_sizes(model: ModelConfig, layout: Layout, stage: int) -> Sizes:
    """What one pipeline rank holds, before experts are divided."""
    sizes = layer_sizes(model)
    total = sum((sizes[layer] for layer in layers_of_rank(model.num_hidden_layers, layout, stage)), Sizes())
    if stage == 0:
        total += sizes["embedding"]
    return total + sizes["head"] if stage == layout.pp - 1 else total


def activation_bytes(model: ModelConfig, layer: int, layout: Layout) -> float:
    """Bytes that one token leaves behind in one layer for its backward pass."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    latent = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    projected = heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    attention = BF16 * (hidden + latent + heads * model.v_head_dim) + FP32 * heads
    if not layout.recompute:
        attention += BF16 * (hidden + latent + projected)
    if layer < model.first_k_dense_replace:
        return attention + _mlp(model.hidden_size, model.intermediate_size, 1, layout)
    router = FP32 * model.n_routed_experts
    shared = _mlp(hidden, model.moe_intermediate_size * model.n_shared_experts, 1, layout)
    routed = _mlp(hidden, model.moe_intermediate_size, model.num_experts_per_tok, layout)
    combined = 0 if layout.recompute else BF16 * model.num_experts_per_tok * hidden
    return attention + router + shared + routed + combined


def _mlp(hidden: int, width: int, copies: int, layout: Layout) -> float:
    """Input of the up-projections, input of SwiGLU and, unless computed again, its output."""
    stored = FP8 if layout.fp8_storage else BF16
    kept = stored * (hidden + 2 * width) * copies
    return kept if layout.recompute else kept + BF16 * width * copies


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Chunks whose activations a pipeline rank holds at most (interleaved 1F1B; Megatron-LM, arXiv 2104.04473)."""
    if layout.virtual_stages == 1:
        return min(layout.pp - stage, micro_batches)
    warmup = 2 * (layout.pp - stage - 1) + (layout.virtual_stages - 1) * layout.pp + 1
    return min(warmup, micro_batches * layout.virtual_stages)


def stage_memory(model: ModelConfig, layout: Layout, stage: int, batch_tokens: int) -> Memory:
    """Bytes on a rank of one pipeline stage."""
    sizes = stage_sizes(model, layout, stage)
    routed, rest = sizes.routed / layout.ep, sizes.shared + sizes.adamw
    held = routed + rest
    muon = (MASTER + MOMENT) * (routed / layout.dp + sizes.shared / layout.data_parallel)
    states = muon + (MASTER + 2 * MOMENT) * sizes.adamw / layout.data_parallel
    kept = chunk_bytes(model, layout, stage)
    count = in_flight(layout, stage, layout.micro_batches(batch_tokens))
    activations = max(kept) * min(count, 2) if layout.offload_activations else _held(kept, count)
    return Memory(
        parameters=PARAMETER * held,
        gradients=GRADIENT * held,
        optimizer=0.0 if layout.offload_optimizer else states,
        activations=activations,
        logits=FP32 * 2 * LOSS_CHUNK_TOKENS * model.vocab_size if stage == layout.pp - 1 else 0.0,
        buffers=_buffers(model, layout),
        host=(states if layout.offload_optimizer else 0.0)
        + (_held(kept, count) if layout.offload_activations else 0.0),
    )


def chunk_bytes(model: ModelConfig, layout: Layout, stage: int) -> list[float]:
    """Activations that one micro-batch leaves in each virtual stage of a pipeline rank."""
    chunks = layers_of_chunks(model.num_hidden_layers, layout.pp * layout.virtual_stages)[stage :: layout.pp]
    tokens = layout.micro_batch_tokens
    return [sum(activation_bytes(model, layer, layout) for layer in chunk) * tokens for chunk in chunks]


def _held(kept: Sequence[float], count: int) -> float:
    """Chunks in flight are spread over the virtual stages."""
    return sum(kept) / len(kept) * count


def _buffers(model: ModelConfig, layout: Layout) -> float:
    """Working memory of a layer (its widest intermediate, twice) and what communication sends and receives."""
    tokens, hidden = layout.micro_batch_tokens, model.hidden_size
    wide = max(model.num_experts_per_tok * 2 * model.moe_intermediate_size, 2 * model.intermediate_size)
    dispatch = 2 * model.num_experts_per_tok * hidden if layout.ep > 1 else 0
    pipeline = 2 * hidden if layout.pp > 1 else 0
    return float(BF16 * tokens * (2 * wide + dispatch + pipeline))


def memory(model: ModelConfig, layout: Layout, batch_tokens: int) -> list[Memory]:
    """Bytes on a rank of every pipeline stage."""
    return [stage_memory(model, layout, stage, batch_tokens) for stage in range(layout.pp)]
