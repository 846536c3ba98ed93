"""Bytes on a rank, by component.

States follow ZeRO-1: weights and float32 gradients on every rank that computes with them; float32 masters, where the
weights are bfloat16, and optimizer states divided over the ranks that hold the same weights (Moonlight, section 2.3).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from k2.config.model import ModelConfig, Recompute
from k2.config.pretrain import PretrainConfig
from k2.model.layout import logical_tensors
from k2.planner.activations import (
    ITEM,
    KEPT_LOGITS,
    QUERY_BLOCK,
    Kept,
    attention_kept,
    head_kept,
    keeps_logits,
    layer_kept,
    mixture_kept,
)
from k2.planner.layout import Layout, layers_of_chunks, layers_of_rank

GRADIENT, MASTER, MOMENT = 4, 4, 4
FP32 = 4
"""Bytes of a value."""
BUCKET_VALUES = 1 << 26
"""Values of all members in a bucket of ZeRO's exchanges (`k2.distributed.zero`)."""
PROBABILITIES: Recompute = "attention_probabilities"
NEWTON_SCHULZ_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Matrices that Newton-Schulz works on at once (`k2.optim.newton_schulz`)."""


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
    """Bytes on one rank.

    parameters, gradients: of what it computes with. optimizer: masters and moments of what it updates.
    activations: what micro-batches in flight leave for their backward passes; logits: of these the last stage's.
    working: the most that a layer or the loss needs besides, for a while.
    communication: what exchanges send from and receive into.
    host: what was offloaded, on the rank's share of its node.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    communication: float
    host: float

    @property
    def gpu(self) -> float:
        """Bytes on the GPU, the reserve left out."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.working + self.communication

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
    total = sum((sizes[layer] for layer in layers_of_rank(model, layout, stage)), Sizes())
    if stage == 0:
        total += sizes["embedding"]
    return total + sizes["head"] if stage == layout.pp - 1 else total


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Chunks whose activations a pipeline rank holds at most (interleaved 1F1B; Megatron-LM, arXiv 2104.04473)."""
    if layout.virtual_stages == 1:
        return min(layout.pp - stage, micro_batches)
    warmup = 2 * (layout.pp - stage - 1) + (layout.virtual_stages - 1) * layout.pp + 1
    return min(warmup, micro_batches * layout.virtual_stages)


def stage_memory(config: PretrainConfig, layout: Layout, stage: int, device: str = "cuda") -> Memory:
    """Bytes on a rank of one pipeline stage; attention on a GPU never keeps its probabilities."""
    if device == "cuda":
        layout = replace(layout, recompute=tuple(dict.fromkeys((*layout.recompute, PROBABILITIES))))
    sizes = stage_sizes(config.model, layout, stage)
    routed, rest = sizes.routed / layout.ep, sizes.shared + sizes.adamw
    parameter = ITEM[config.param_dtype]
    master = MASTER if parameter < MASTER else 0
    muon = (master + MOMENT) * (routed / layout.dp + sizes.shared / layout.data_parallel)
    states = muon + (master + 2 * MOMENT) * sizes.adamw / layout.data_parallel
    kept = chunk_bytes(config, layout, stage)
    count = in_flight(layout, stage, layout.micro_batches(config.batch_tokens))
    last = stage == layout.pp - 1
    return Memory(
        parameters=parameter * (routed + rest),
        gradients=GRADIENT * (routed + rest),
        optimizer=states * (not layout.offload_optimizer) + _workspace(config, layout, stage, device),
        activations=_held([chunk.device for chunk in kept], count),
        logits=head_kept(config, layout) if last else 0.0,
        working=_working(config, layout, last, device),
        communication=_communication(config, layout, routed, rest),
        host=states * layout.offload_optimizer + _held([chunk.host for chunk in kept], count),
    )


def chunk_bytes(config: PretrainConfig, layout: Layout, stage: int) -> list[Kept]:
    """Activations that one micro-batch leaves in each virtual stage of a pipeline rank."""
    model = config.model
    chunks = layers_of_chunks(model, layout.pp, layout.virtual_stages)[stage :: layout.pp]
    dense, mixture = layer_kept(config, layout, True), layer_kept(config, layout, False)
    first = [min(max(model.first_k_dense_replace - chunk.start, 0), len(chunk)) for chunk in chunks]
    return [count * dense + (len(chunk) - count) * mixture for chunk, count in zip(chunks, first, strict=True)]


def _held(kept: Sequence[float], count: int) -> float:
    """Chunks in flight are spread over the virtual stages."""
    return sum(kept) / len(kept) * count


def _working(config: PretrainConfig, layout: Layout, last: bool, device: str) -> float:
    """The most that a layer's backward pass needs, or the loss's, which is over before the first layer's begins."""
    layer = _layer_working(config, layout, device)
    return max(_loss_working(config, layout), layer - head_kept(config, layout)) if last else layer


def _layer_working(config: PretrainConfig, layout: Layout, device: str) -> float:
    """Experts first, then attention, when what the experts had is free; what is computed again or widened is there.

    Probabilities alone are computed again block by block; of what is offloaded the layer before is on its way as well.
    """
    whole = "layers" in layout.recompute
    blocks: tuple[Recompute, ...] = (PROBABILITIES,) if PROBABILITIES in layout.recompute else ()
    kept = replace(layout, recompute=blocks) if whole else layout
    wide = replace(kept, recompute=blocks, fp8_storage=False)
    attention, mixture = attention_kept(config, kept), mixture_kept(config, kept)
    arrived = 2 * layer_kept(config, layout, False).host + (attention + mixture if whole else 0.0)
    first = _mixture_working(config, layout, device) + mixture_kept(config, wide) - mixture
    second = _attention_working(config, layout, device) + attention_kept(config, wide) - attention - mixture
    return arrived + max(first, second)


def _attention_working(config: PretrainConfig, layout: Layout, device: str) -> float:
    """A block of logits for the last queries, or another one and the gradients of queries, keys and values so far.

    The kernels of a GPU have no logits.
    """
    model, item = config.model, ITEM[config.precision]
    width, value = model.qk_head_dim, model.v_head_dim
    block = item * QUERY_BLOCK * (1 + (PROBABILITIES in layout.recompute)) if device == "cpu" else 0
    gradients = item * (2 * width + value) + FP32 * (width + value)
    later = gradients + block * max(0, config.context_length - QUERY_BLOCK) / config.context_length
    return layout.micro_batch_tokens * model.num_attention_heads * max(item * width + block, later)


def _mixture_working(config: PretrainConfig, layout: Layout, device: str) -> float:
    """Gradients of all experts before they are added to those of other micro-batches, and those of rows.

    A CPU takes a few experts at a time; the kernels of a GPU have inputs, gradients and gate and up of all rows.
    """
    model, hidden, width = config.model, config.model.hidden_size, config.model.moe_intermediate_size
    experts = 3 * hidden * width * model.n_routed_experts / layout.ep
    rows = model.num_experts_per_tok * (hidden if device == "cpu" else 3 * hidden + 4 * width) + 3 * hidden
    return ITEM[config.param_dtype] * experts + ITEM[config.precision] * layout.micro_batch_tokens * rows


def _loss_working(config: PretrainConfig, layout: Layout) -> float:
    """Gradients of the hidden states in float32, or of the head's weight and logits that were not kept."""
    model, item, hidden = config.model, ITEM[config.precision], layout.micro_batch_tokens * config.model.hidden_size
    weight, logits = model.vocab_size * model.hidden_size, layout.micro_batch_tokens * model.vocab_size
    if not keeps_logits(config, layout):
        return (item + FP32) * weight + 2 * item * hidden + item * KEPT_LOGITS
    after = (item + ITEM[config.param_dtype]) * weight + item * hidden - item * logits
    return max(3 * FP32 * hidden, item * weight + (item + 2 * FP32) * hidden, after)


@lru_cache(maxsize=8)
def _matrices(model: ModelConfig, dense: bool) -> Counter[tuple[int, int]]:
    """Shapes of Muon's matrices in one layer."""
    layer = 0 if dense else model.num_hidden_layers - 1
    shapes = [tensor.shape for tensor in logical_tensors(model) if tensor.group == "muon" and tensor.layer == layer]
    return Counter((rows, columns) for rows, columns in shapes)


def _workspace(config: PretrainConfig, layout: Layout, stage: int, device: str) -> float:
    """What Newton-Schulz works in (`k2.optim.newton_schulz`): as many matrices of a shape as it takes at once."""
    layers = layers_of_rank(config.model, layout, stage)
    dense = sum(layer < config.model.first_k_dense_replace for layer in layers)
    shapes: Counter[tuple[int, int]] = Counter()
    for copies, kind in ((dense, True), (len(layers) - dense, False)):
        shapes.update({shape: copies * number for shape, number in _matrices(config.model, kind).items() if copies})
    item, values, squares = 2 if config.optimizer.newton_schulz_bf16 else FP32, 0, 0
    for (rows, columns), number in shapes.items():
        room = NEWTON_SCHULZ_BYTES[device] // (rows * columns * item)
        count = max(1, min(room, number // layout.data_parallel))
        values, squares = max(values, count * rows * columns), max(squares, count * min(rows, columns) ** 2)
    return float(2 * item * values + 4 * item * squares)


def _communication(config: PretrainConfig, layout: Layout, routed: float, rest: float) -> float:
    """Rows to and from other ranks' experts, hidden states of the pipeline, and ZeRO's largest bucket."""
    rows = ITEM[config.precision] * layout.micro_batch_tokens * config.model.hidden_size
    dispatch = 2 * config.model.num_experts_per_tok * rows if layout.ep > 1 else 0
    neighbours = 3 * rows if layout.pp > 1 else 0
    groups = ((rest, layout.data_parallel), (routed, layout.dp))
    bucket = max((members + 1) * min(BUCKET_VALUES, values) / members for values, members in groups)
    return float(dispatch + neighbours + (GRADIENT * bucket if layout.ranks > 1 else 0))


def memory(config: PretrainConfig, layout: Layout) -> list[Memory]:
    """Bytes on a rank of every pipeline stage."""
    return [stage_memory(config, layout, stage) for stage in range(layout.pp)]
