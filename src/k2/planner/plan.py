"""A plan: does it fit, how long does it take, what does it cost; and the search for a better one."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import sqrt
from typing import Any

from k2.config.cluster import Cluster
from k2.config.model import ModelConfig
from k2.config.pretrain import PretrainConfig
from k2.errors import UserError
from k2.model.layout import parameter_counts
from k2.planner.layout import ACTIVATION_SWITCHES, Layout, activation_switches, candidates, describe
from k2.planner.memory import MASTER, MOMENT, Memory, memory, stage_memory
from k2.planner.time import GIGA, StepTime, step_time, utilisation

HOURS_A_DAY, SECONDS_AN_HOUR = 24.0, 3600.0


@dataclass(frozen=True)
class Checkpointing:
    """How often to save, and what failures cost.

    interval_s: seconds between saves that lose the least: sqrt(2 x stall x time between failures) (Young, Daly).
    lost: share of all time spent on saving, on work done again and on restarts.
    """

    bytes: float
    stall_s: float
    write_s: float
    load_s: float
    mean_time_between_failures_s: float
    interval_s: float
    interval_steps: int
    lost: float


@dataclass(frozen=True)
class Plan:
    """One layout of one preset on one cluster.

    stages: memory of a rank of every pipeline stage.
    options: memory of the fullest stage under each choice of what becomes of activations, and no other change.
    long_layout, long_stages: the same at the long context, which may need more switches or another division; a
        checkpoint is read by any.
    sync_s: seconds in which reinforcement learning brings the weights to all ranks.
    """

    layout: Layout
    stages: list[Memory]
    options: dict[str, Memory]
    long_layout: Layout
    long_stages: list[Memory]
    step: StepTime
    long_step: StepTime
    utilisation: float
    steps: int
    days: float
    gpu_hours: float
    cost: float
    checkpointing: Checkpointing
    sync_s: float

    @property
    def fullest(self) -> Memory:
        """Memory of the rank that decides."""
        return max(self.stages, key=lambda stage: stage.gpu)

    @property
    def long_fullest(self) -> Memory:
        """The same at the long context."""
        return max(self.long_stages, key=lambda stage: stage.gpu)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = asdict(self)
        plain |= {"step": self.step.as_dict(), "long_step": self.long_step.as_dict()}
        plain |= {"options": {name: each.as_dict() for name, each in self.options.items()}}
        plain |= {"long_stages": [stage.as_dict() for stage in self.long_stages]}
        return plain | {"stages": [stage.as_dict() for stage in self.stages]}


def problem(config: PretrainConfig, layout: Layout, cluster: Cluster) -> str | None:
    """Why a layout cannot be used, or None: it does not divide, or a rank or a node has too little memory."""
    if layout.ranks != cluster.gpus:
        product = f"pp x ep x dp = {layout.pp} x {layout.ep} x {layout.dp} = {layout.ranks}"
        return f"{product}, the cluster has {cluster.gpus} GPUs"
    found = layout.problem(config.model, config.batch_tokens, config.context_length)
    if found:
        return found
    room = cluster.gpu.memory_gb - cluster.gpu.reserved_gb
    for stage in sorted({0, min(1, layout.pp - 1), layout.pp // 2, layout.pp - 1}):
        need = stage_memory(config, layout, stage)
        if need.gpu > room * GIGA:
            return f"a rank of pipeline stage {stage} needs {need.gpu / GIGA:.1f} GB, a GPU has {room:.1f} to give"
        if need.host * cluster.gpus_per_node > 0.8 * cluster.host_memory_gb * GIGA:
            host = need.host * cluster.gpus_per_node / GIGA
            return f"offloading takes {host:.0f} GB of a node's host memory, it has {cluster.host_memory_gb:.0f}"
    return None


def make_plan(config: PretrainConfig, layout: Layout, cluster: Cluster) -> Plan:
    """Work a layout out.

    Raises:
        UserError: it cannot be used; names the reason and the nearest layout that can.
    """
    reason = problem(config, layout, cluster)
    if reason:
        near = nearest(config, layout, cluster)
        remedy = f"the nearest layout that works is {describe(near)}" if near else "no layout of this cluster works"
        raise UserError(f"layout: {reason}; {remedy}")
    return _worked_out(config, layout, cluster)


def long_layout(config: PretrainConfig, layout: Layout, cluster: Cluster) -> Layout:
    """The layout of the long-context phase: this one with as few more switches as it takes, or the nearest that fits.

    Raises:
        UserError: none fits.
    """
    longer = long_context(config)
    same = replace(layout, micro_batch_tokens=max(layout.micro_batch_tokens, config.long_context_length))
    tried = (same, *(replace(same, **switches) for switches in ACTIVATION_SWITCHES))
    fitting = (candidate for candidate in tried if problem(longer, candidate, cluster) is None)
    found = next(fitting, None) or nearest(longer, same, cluster)
    if found is None:
        context = config.long_context_length
        raise UserError(f"cluster {cluster.name}: no layout holds a row of {context} tokens; give it more nodes")
    return found


def long_context(config: PretrainConfig) -> PretrainConfig:
    """The configuration in the long-context phase."""
    return config.model_copy(update={"context_length": config.long_context_length})


def _worked_out(config: PretrainConfig, layout: Layout, cluster: Cluster) -> Plan:
    model, batch, long_config = config.model, config.batch_tokens, long_context(config)
    short = step_time(config, layout, cluster)
    longer = long_layout(config, layout, cluster)
    long = step_time(long_config, longer, cluster)
    long_steps = config.long_context_tokens / batch
    seconds = short.total * (config.steps - long_steps) + long.total * long_steps
    saving = checkpointing(config, layout, cluster, short.total)
    hours = seconds / (1.0 - saving.lost) / SECONDS_AN_HOUR
    return Plan(
        layout=layout,
        stages=memory(config, layout),
        options=options(config, layout),
        long_layout=longer,
        long_stages=memory(long_config, longer),
        step=short,
        long_step=long,
        utilisation=utilisation(model, cluster, short, batch, config.context_length),
        steps=config.steps,
        days=hours / HOURS_A_DAY,
        gpu_hours=hours * cluster.gpus,
        cost=hours * cluster.gpus * cluster.price_per_gpu_hour,
        checkpointing=saving,
        sync_s=sync_seconds(model, cluster),
    )


@lru_cache(maxsize=8)
def _parameters(model: ModelConfig) -> int:
    return parameter_counts(model).total


def options(config: PretrainConfig, layout: Layout) -> dict[str, Memory]:
    """Memory of the fullest stage by what becomes of activations."""
    plain = replace(layout, recompute=(), fp8_storage=False, offload_activations=False)
    return {
        activation_switches(changed): max(memory(config, changed), key=lambda stage: stage.gpu)
        for changed in (replace(plain, **switches) for switches in ACTIVATION_SWITCHES)
    }


def sync_seconds(model: ModelConfig, cluster: Cluster) -> float:
    """Time of one weight synchronisation by `k2.distributed.sync`: every bucket passes every rank, in one ring.

    Weights travel as FP8 with a float32 scale for 128 x 128 of them, as K2's engine serves them (the report's section
    3.3). The ring is as fast as its links between nodes. Buckets are packed, added up and taken beside it, so that a
    rank's memory reads all twice and writes at most all; filling and emptying the pipeline takes under a millisecond.
    """
    size = _parameters(model) * (1.0 + 4.0 / 128**2)
    link = cluster.network.remote_gb_s if cluster.nodes > 1 else cluster.network.local_gb_s
    return max(size / (link * cluster.network.efficiency * GIGA), 3.0 * size / (cluster.gpu.memory_gb_s * GIGA))


def checkpointing(config: PretrainConfig, layout: Layout, cluster: Cluster, step_s: float) -> Checkpointing:
    """The interval between saves that loses the least; training stalls for the copy to the host only."""
    size = float(MASTER + MOMENT) * _parameters(config.model)
    stall = size / cluster.gpus / (cluster.gpu.pcie_gb_s * GIGA)
    write, load = size / (cluster.storage.write_gb_s * GIGA), size / (cluster.storage.read_gb_s * GIGA)
    between = cluster.reliability.gpu_hours_between_failures * SECONDS_AN_HOUR / cluster.gpus
    interval = max(sqrt(2.0 * stall * between), write, step_s)
    restart = 60.0 * cluster.reliability.restart_minutes + load
    lost = stall / interval + (interval / 2.0 + write + restart) / between
    return Checkpointing(size, stall, write, load, between, interval, max(1, round(interval / step_s)), min(lost, 0.99))


def search(config: PretrainConfig, cluster: Cluster, count: int = 5) -> list[Plan]:
    """The fastest layouts that fit.

    Raises:
        UserError: none fits.
    """
    fitting = list(_usable(config, cluster))
    if not fitting:
        gpu = cluster.gpu
        raise UserError(
            f"cluster {cluster.name}: no layout holds the model on {cluster.gpus} GPUs of {gpu.memory_gb:g} GB;"
            " give it more nodes"
        )
    timed = [(step_time(config, layout, cluster).total, index) for index, layout in enumerate(fitting)]
    return [_worked_out(config, fitting[index], cluster) for _, index in sorted(timed)[:count]]


def nearest(config: PretrainConfig, wanted: Layout, cluster: Cluster) -> Layout | None:
    """The usable layout that differs least from the wanted one: in few fields, and by little."""

    def distance(layout: Layout) -> float:
        pairs = zip(asdict(wanted).values(), asdict(layout).values(), strict=True)
        return float(sum((a != b) + _apart(a, b) for a, b in pairs))

    return min(_usable(config, cluster), key=distance, default=None)


def _apart(a: Any, b: Any) -> float:
    """How far two values of a field are from each other, at most 1."""
    if isinstance(a, tuple):
        return len({*a} ^ {*b}) / max(1, len({*a} | {*b}))
    return float(abs(a - b) / max(a, b, 1))


def _usable(config: PretrainConfig, cluster: Cluster) -> Iterator[Layout]:
    for layout in candidates(config.model, cluster.gpus, config.context_length):
        if problem(config, layout, cluster) is None:
            yield layout


def what_if(config: PretrainConfig, layout: Layout, cluster: Cluster) -> dict[str, Plan | None]:
    """The same plan under other circumstances; None where it no longer fits."""
    gpu, network = cluster.gpu, cluster.network
    cases: Mapping[str, tuple[Layout, Cluster]] = {
        "twice the nodes": (replace(layout, dp=2 * layout.dp), cluster.model_copy(update={"nodes": 2 * cluster.nodes})),
        "half the network": (
            layout,
            cluster.model_copy(update={"network": network.model_copy(update={"remote_gb_s": network.remote_gb_s / 2})}),
        ),
        "a fifth less efficiency": (
            layout,
            cluster.model_copy(update={"gpu": gpu.model_copy(update={"efficiency": 0.8 * gpu.efficiency})}),
        ),
        "no recomputation": (replace(layout, recompute=()), cluster),
        "whole layers computed again": (replace(layout, recompute=("layers",)), cluster),
        "activations in bfloat16": (replace(layout, fp8_storage=False), cluster),
        "activations on the host": (replace(layout, offload_activations=True), cluster),
    }
    return {
        name: None if problem(config, changed, place) else _worked_out(config, changed, place)
        for name, (changed, place) in cases.items()
        if (changed, place) != (layout, cluster)
    }
