"""Seconds of one optimizer step, by where they go, and what a whole pretraining takes.

A step is `micro_batches` passes through the slowest pipeline stage, the pipeline's bubble, what communication no
computation hides, and the optimizer. Everything is counted from the model's table and the cluster's constants.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

from k2.config.cluster import Cluster
from k2.config.model import ModelConfig, Recompute
from k2.config.optimizer import OptimizerConfig
from k2.config.pretrain import PretrainConfig
from k2.model.cost import token_cost
from k2.model.layout import logical_tensors
from k2.optim.schemes import SCHEMES
from k2.planner.layout import Layout, layers_of_rank
from k2.planner.memory import FP32, chunk_bytes, layer_sizes, stage_sizes

GIGA, TERA = 1e9, 1e12
BF16 = 2
NEWTON_SCHULZ_STEPS = len(SCHEMES[OptimizerConfig().newton_schulz].polynomials)


@dataclass(frozen=True)
class Traffic:
    """One kind of communication in one step, on the busiest rank: bytes, seconds, and seconds nothing hides."""

    bytes: float
    seconds: float
    exposed: float

    @property
    def hidden(self) -> bool:
        """Whether computation covers all of it."""
        return self.exposed == 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; `states` is the pass over gradients, weights and momentum."""

    compute: float
    recompute: float
    bubble: float
    newton_schulz: float
    states: float
    traffic: dict[str, Traffic]

    @property
    def exposed(self) -> float:
        """Communication that is waited for."""
        return sum(each.exposed for each in self.traffic.values())

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.recompute + self.bubble + self.newton_schulz + self.states + self.exposed

    def as_dict(self) -> dict[str, object]:
        """Components, their sum, and the pipeline's bubble as a share."""
        return asdict(self) | {"exposed": self.exposed, "total": self.total, "bubble_share": self.bubble / self.total}


def step_time(config: PretrainConfig, layout: Layout, cluster: Cluster) -> StepTime:
    """Time of one step on the cluster's GPUs."""
    model, context = config.model, config.context_length
    peak = cluster.gpu.bf16_tflops * TERA * cluster.gpu.efficiency
    micro_batches = layout.micro_batches(config.batch_tokens)
    passes = micro_batches * layout.micro_batch_tokens
    forward = [stage_flops(model, layout, stage, context) for stage in range(layout.pp)]
    again = [_recomputed_flops(model, layout, stage, context) for stage in range(layout.pp)]
    slowest = max(range(layout.pp), key=lambda stage: 3 * forward[stage] + again[stage])
    compute, recompute = 3 * forward[slowest] * passes / peak, again[slowest] * passes / peak
    one = (compute + recompute) / micro_batches
    return StepTime(
        compute=compute,
        recompute=recompute,
        bubble=(layout.pp - 1) * one / layout.virtual_stages,
        newton_schulz=newton_schulz_seconds(model, layout, cluster),
        states=_states_seconds(model, layout, cluster),
        traffic={
            "expert all-to-all": _all_to_all(model, layout, cluster, micro_batches, one),
            "pipeline": _pipeline(model, layout, cluster, micro_batches, one),
            "gradients and parameters": _data_parallel(model, layout, cluster, one),
            "offload": _offload(config, layout, cluster, micro_batches, one),
        },
    )


def stage_flops(model: ModelConfig, layout: Layout, stage: int, context: int) -> float:
    """Forward operations of one token on one pipeline rank."""
    head = _head_flops(model)
    layers = layers_of_rank(model, layout, stage)
    total = sum(_layer_flops(model, layer, context) for layer in layers)
    return total + head if stage == layout.pp - 1 else total


def _head_flops(model: ModelConfig) -> float:
    return 2.0 * model.vocab_size * model.hidden_size


@lru_cache(maxsize=512)
def _layer_flops(model: ModelConfig, layer: int, context: int) -> float:
    """Two operations per weight that a token meets, and the layer's share of attention over the context."""
    sizes = layer_sizes(model)[layer]
    active = sizes.routed * model.num_experts_per_tok / model.n_routed_experts + sizes.shared
    pair = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    return 2.0 * active + pair * (context + 1)


def _recomputed_flops(model: ModelConfig, layout: Layout, stage: int, context: int) -> float:
    """Forward operations that the backward pass of one token repeats; a GPU's attention repeats its own in any case."""
    layers = layers_of_rank(model, layout, stage)
    return sum(_layer_again(model, layout.recompute, layer, context) for layer in layers)


@lru_cache(maxsize=4096)
def _layer_again(model: ModelConfig, recompute: tuple[Recompute, ...], layer: int, context: int) -> float:
    if "layers" in recompute:
        return _layer_flops(model, layer, context)
    heads, hidden, dense = model.num_attention_heads, model.hidden_size, layer < model.first_k_dense_replace
    query = (model.q_lora_rank or hidden) * heads * model.qk_head_dim
    mla = query + model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    mixture = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
    operations = {
        "mla_up_projections": 2.0 * mla,
        "mlp_up_projections": 4.0 * hidden * (model.intermediate_size if dense else mixture),
    }
    return sum(operations.get(name, 0.0) for name in recompute)


@lru_cache(maxsize=8)
def _newton_schulz_flops(model: ModelConfig) -> dict[int, tuple[float, float, float]]:
    """Operations for routed and other matrices of every layer, and for the largest of the others.

    An iteration is 4 m^2 n + 2 m^3, m the shorter side.
    """
    found: dict[int, tuple[float, float, float]] = {}
    for tensor in logical_tensors(model):
        if tensor.group == "muon" and tensor.layer is not None:
            short, long = sorted(tensor.shape)
            cost = NEWTON_SCHULZ_STEPS * (4.0 * short * short * long + 2.0 * short**3)
            routed, rest, largest = found.get(tensor.layer, (0.0, 0.0, 0.0))
            more = (routed + cost, rest, largest) if tensor.quantized else (routed, rest + cost, max(largest, cost))
            found[tensor.layer] = more
    return found


def newton_schulz_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """Whole matrices divided over the ranks that hold them; the busiest has its mean or the largest one."""
    flops, costs = 0.0, _newton_schulz_flops(model)
    for stage in range(layout.pp):
        routed, rest, largest = zip(*(costs[n] for n in layers_of_rank(model, layout, stage)), strict=True)
        dense = max(sum(rest) / layout.data_parallel, max(largest))
        flops = max(flops, sum(routed) / layout.ep / layout.dp + dense)
    return flops / (cluster.gpu.bf16_tflops * TERA * cluster.gpu.newton_schulz_efficiency)


def _states_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    stored = max(_states_bytes(model, layout, stage) for stage in range(layout.pp))
    return 2 * stored / (cluster.gpu.memory_gb_s * GIGA)


def _states_bytes(model: ModelConfig, layout: Layout, stage: int) -> float:
    sizes = stage_sizes(model, layout, stage)
    rest = 8 * sizes.shared / layout.data_parallel + 12 * sizes.adamw / layout.data_parallel
    return 8 * sizes.routed / layout.ep / layout.dp + rest


def _bandwidth(cluster: Cluster, ranks: int, stride: int) -> float:
    """Bytes per second of one rank in a group of `ranks` that are `stride` apart; the slower part decides."""
    inside = max(1, min(ranks, cluster.gpus_per_node // stride)) if stride < cluster.gpus_per_node else 1
    remote = (ranks - inside) / max(1, ranks - 1)
    local = 1.0 - remote
    seconds = max(local / cluster.network.local_gb_s, remote / cluster.network.remote_gb_s)
    return GIGA * cluster.network.efficiency / seconds


def _all_to_all(model: ModelConfig, layout: Layout, cluster: Cluster, micro_batches: int, one: float) -> Traffic:
    """Tokens to their experts and back, forward and backward; expert ranks are neighbours. Overlapped in 1F1B."""
    if layout.ep == 1:
        return Traffic(0.0, 0.0, 0.0)
    layers = max(
        sum(layer >= model.first_k_dense_replace for layer in layers_of_rank(model, layout, stage))
        for stage in range(layout.pp)
    )
    once = BF16 * layout.micro_batch_tokens * model.num_experts_per_tok * model.hidden_size
    sent = 4.0 * layers * once * (layout.ep - 1) / layout.ep
    seconds = sent / _bandwidth(cluster, layout.ep, 1)
    return Traffic(sent * micro_batches, seconds * micro_batches, max(0.0, seconds - one) * micro_batches)


def _pipeline(model: ModelConfig, layout: Layout, cluster: Cluster, micro_batches: int, one: float) -> Traffic:
    """Activations to the next stage and gradients back, for every virtual stage."""
    if layout.pp == 1:
        return Traffic(0.0, 0.0, 0.0)
    sent = 2.0 * BF16 * layout.micro_batch_tokens * model.hidden_size * layout.virtual_stages
    seconds = sent / _bandwidth(cluster, layout.pp, layout.data_parallel)
    return Traffic(sent * micro_batches, seconds * micro_batches, max(0.0, seconds - one) * micro_batches)


def _data_parallel(model: ModelConfig, layout: Layout, cluster: Cluster, one: float) -> Traffic:
    """Float32 gradients reduced to their owners and bfloat16 parameters gathered, beside the last micro-batch."""
    sizes = max((stage_sizes(model, layout, stage) for stage in range(layout.pp)), key=lambda s: s.routed + s.shared)
    rest, routed = sizes.shared + sizes.adamw, sizes.routed / layout.ep
    dense = (FP32 + BF16) * rest * (layout.data_parallel - 1) / layout.data_parallel
    experts = (FP32 + BF16) * routed * (layout.dp - 1) / layout.dp
    seconds = dense / _bandwidth(cluster, layout.data_parallel, 1) + experts / _bandwidth(cluster, layout.dp, layout.ep)
    return Traffic(dense + experts, seconds, max(0.0, seconds - one))


def _offload(config: PretrainConfig, layout: Layout, cluster: Cluster, micro_batches: int, one: float) -> Traffic:
    """Activations to the host and back beside computation; masters and momentum visit the GPU for the update."""
    activations = states = 0.0
    if layout.offload_activations:
        kept = max(sum(chunk.host for chunk in chunk_bytes(config, layout, stage)) for stage in range(layout.pp))
        activations = 2.0 * kept * micro_batches
    if layout.offload_optimizer:
        states = max(_states_bytes(config.model, layout, stage) for stage in range(layout.pp))
    rate = cluster.gpu.pcie_gb_s * GIGA
    exposed = max(0.0, activations / rate / micro_batches - one) * micro_batches + states / rate
    return Traffic(activations + states, (activations + states) / rate, exposed)


@lru_cache(maxsize=8)
def _training_flops(model: ModelConfig, context: int) -> float:
    return token_cost(model, context).flops_training


def utilisation(model: ModelConfig, cluster: Cluster, step: StepTime, batch_tokens: int, context: int) -> float:
    """Model FLOPs utilisation: what the model needs over what the GPUs could do in a step."""
    needed = _training_flops(model, context) * batch_tokens
    return needed / (step.total * cluster.gpus * cluster.gpu.bf16_tflops * TERA)
