"""Bytes on a rank, by component.

States follow ZeRO-1: weights and float32 gradients on every rank that computes with them; float32 masters, where the
weights are bfloat16, and optimizer states divided over the ranks that hold the same weights (Moonlight, section 2.3).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from k2.config.model import ModelConfig
from k2.config.pretrain import PretrainConfig
from k2.model.layout import logical_tensors
from k2.planner.activations import (
    Kept,
    embedding_gradient,
    embedding_moment,
    head_gradients,
    head_kept,
    layer_memory,
    loss_moments,
)
from k2.planner.layout import Layout, layers_of_chunks, layers_of_rank
from k2.planner.liveness import Moment, fullest
from k2.planner.operations import ITEM, Sizes

GRADIENT, MASTER, MOMENT = 4, 4, 4
FP32 = 4
"""Bytes of a value."""
BUCKET_VALUES = 1 << 26
"""Values of all members in a bucket of ZeRO's exchanges (`k2.distributed.zero`)."""
NEWTON_SCHULZ_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Matrices that Newton-Schulz works on at once (`k2.optim.newton_schulz`)."""


@dataclass(frozen=True)
class Values:
    """Values of one layer, or of embedding or head: routed experts, other Muon matrices, what AdamW updates."""

    routed: int = 0
    shared: int = 0
    adamw: int = 0

    def __add__(self, other: "Values") -> "Values":
        return Values(self.routed + other.routed, self.shared + other.shared, self.adamw + other.adamw)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    parameters, gradients: of what it computes with. optimizer: masters and moments of what it updates.
    activations: what micro-batches in flight leave for their backward passes; logits: of these the last stage's.
    working: what the fullest moment needs besides; less than nothing where a step is one micro-batch, whose gradients
        come while its activations go, unless they go where those of the step before were.
    peak: that moment.
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
    peak: str

    @property
    def gpu(self) -> float:
        """Bytes on the GPU, the reserve left out."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.working + self.communication

    def as_dict(self) -> dict[str, Any]:
        """Components, their sum, and when it is reached."""
        return asdict(self) | {"gpu": self.gpu}


@lru_cache(maxsize=4)
def layer_sizes(model: ModelConfig) -> dict[str | int, Values]:
    """Sizes of every layer, of `embedding` and of `head` (with the last norm)."""
    found: dict[str | int, Values] = defaultdict(Values)
    for tensor in logical_tensors(model):
        outside = "embedding" if tensor.component == "embed_tokens" else "head"
        part = outside if tensor.layer is None else tensor.layer
        found[part] += Values(
            routed=tensor.size if tensor.quantized else 0,
            shared=tensor.size if tensor.group == "muon" and not tensor.quantized else 0,
            adamw=tensor.size if tensor.group != "muon" else 0,
        )
    return dict(found)


def stage_sizes(model: ModelConfig, layout: Layout, stage: int) -> Values:
    """What one pipeline rank holds, before experts are divided."""
    sizes = layer_sizes(model)
    total = sum((sizes[layer] for layer in layers_of_rank(model, layout, stage)), Values())
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
    """Bytes on a rank of one pipeline stage, on a GPU or on a CPU."""
    values = stage_sizes(config.model, layout, stage)
    routed, rest = values.routed / layout.ep, values.shared + values.adamw
    parameter = ITEM[config.param_dtype]
    master = MASTER if parameter < MASTER else 0
    muon = (master + MOMENT) * (routed / layout.dp + values.shared / layout.data_parallel)
    states = muon + (master + 2 * MOMENT) * values.adamw / layout.data_parallel
    sizes = Sizes.of(config, layout, device == "cpu")
    kept, gradients = chunk_bytes(config, layout, stage, device), GRADIENT * (routed + rest)
    count = in_flight(layout, stage, layout.micro_batches(config.batch_tokens))
    activations = _held([chunk.device for chunk in kept], count) + _shared(sizes)
    logits = head_kept(sizes) if stage == layout.pp - 1 else 0.0
    peak = fullest([*_moments(sizes, layout, stage, activations), Moment(gradients, "optimizer")])
    return Memory(
        parameters=parameter * (routed + rest),
        gradients=gradients,
        optimizer=states * (not layout.offload_optimizer) + _workspace(config, layout, stage, device),
        activations=activations,
        logits=logits,
        working=peak.bytes - activations - logits - gradients,
        communication=_communication(config, layout, routed, rest),
        host=states * layout.offload_optimizer + _held([chunk.host for chunk in kept], count),
        peak=peak.where,
    )


def chunk_bytes(config: PretrainConfig, layout: Layout, stage: int, device: str = "cuda") -> list[Kept]:
    """Activations that one micro-batch leaves in each virtual stage of a pipeline rank."""
    model, sizes = config.model, Sizes.of(config, layout, device == "cpu")
    chunks = layers_of_chunks(model, layout.pp, layout.virtual_stages)[stage :: layout.pp]
    dense, mixture = (layer_memory(sizes, kind).kept for kind in (True, False))
    first = [min(max(model.first_k_dense_replace - chunk.start, 0), len(chunk)) for chunk in chunks]
    return [count * dense + (len(chunk) - count) * mixture for chunk, count in zip(chunks, first, strict=True)]


def _held(kept: Sequence[float], count: int) -> float:
    """Chunks in flight are spread over the virtual stages."""
    return sum(kept) / len(kept) * count


def _shared(sizes: Sizes) -> float:
    """The mask of documents, which all layers of a micro-batch share; kernels of a GPU need none."""
    return FP32 * sizes.tokens * sizes.context if sizes.masked and sizes.cpu else 0.0


def _moments(sizes: Sizes, layout: Layout, stage: int, held: float) -> Iterator[Moment]:
    """Bytes of activations and gradients through a micro-batch.

    held: what all micro-batches in flight have left in the layers.
    """
    model, total = sizes.model, stage_sizes(sizes.model, layout, stage)
    chunks = layers_of_chunks(model, layout.pp, layout.virtual_stages)[stage :: layout.pp]
    memories = {n: layer_memory(sizes, n < model.first_k_dense_replace) for chunk in chunks for n in chunk}
    head, embedding = head_gradients(sizes) * (stage == layout.pp - 1), embedding_gradient(sizes) * (stage == 0)
    there = GRADIENT * _values(total, layout) - head - embedding - sum(each.gradients for each in memories.values())
    if stage == layout.pp - 1:
        yield from (Moment(held + head_kept(sizes) + there + each.bytes, each.where) for each in loss_moments(sizes))
    came = there + head
    for chunk in reversed(chunks):
        scores, below = sum(memories[number].score_gradients for number in chunk), held
        for number in reversed(chunk):
            memory = memories[number]
            fetched = memories[number - 1].kept.host if number > chunk.start else 0.0
            below -= memory.kept.device
            yield memory.forward.more(below + there, f"forward of layer {number}")
            yield memory.backward.more(below + came + fetched + scores, f"backward of layer {number}")
            scores -= memory.score_gradients
            came += memory.gradients
    if stage == 0:
        moment = embedding_moment(sizes)
        yield Moment(moment.bytes + came, moment.where)


def _values(values: Values, layout: Layout) -> float:
    """What of them a rank computes with."""
    return values.routed / layout.ep + values.shared + values.adamw


@lru_cache(maxsize=8)
def _matrices(model: ModelConfig, dense: bool) -> Counter[tuple[int, int]]:
    """Shapes of Muon's matrices in one layer."""
    layer = 0 if dense else model.num_hidden_layers - 1
    shapes = [tensor.shape for tensor in logical_tensors(model) if tensor.group == "muon" and tensor.layer == layer]
    return Counter((rows, columns) for rows, columns in shapes)


def _workspace(config: PretrainConfig, layout: Layout, stage: int, device: str) -> float:
    """What Newton-Schulz works in (`k2.optim.newton_schulz`): as many matrices of a shape as it takes at once.

    On a GPU there are also products of them; in C those are a thread's own.
    """
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
    return float(item * (values if device == "cpu" and item == 2 else 2 * values + 4 * squares))


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
