"""A plan for people: text for the terminal, a page, and Helm values to paste."""

from collections.abc import Mapping, Sequence

import yaml

from k2.config.cluster import Cluster
from k2.monitoring.blocks import Block, Facts, Figure, Preformatted, Prose, Section, Table
from k2.monitoring.figures import bars, stacked_bars
from k2.monitoring.format import duration, number
from k2.monitoring.page import render_page
from k2.planner.layout import describe
from k2.planner.memory import Memory
from k2.planner.plan import Plan
from k2.planner.time import GIGA, StepTime

COMPONENTS = ("parameters", "gradients", "optimizer", "activations", "logits", "working", "communication")
TIMELINE = ("waits to begin", "micro-batches", "waits in between", "waits to end", "exchange", "optimizer")
NOTE = (
    "Counted, not measured: bytes and operations follow from the model's table of tensors, times from the constants of"
    " the cluster file. No GPU has confirmed the times."
)


def plan_text(plan: Plan, cluster: Cluster) -> str:
    """The plan in lines of at most 100 characters or so."""
    lines = [f"{name:<28}{value}" for name, value in _facts(plan, cluster)]
    lines += ["", f"memory of the fullest rank, GB; it is reached in {plan.fullest.peak}"]
    lines += [f"  {name:<26}{value:8.1f}" for name, value in _memory_rows(plan.fullest)]
    lines += ["", "activations and all of the fullest rank, GB, by what becomes of them"]
    lines += [
        f"  {name:<100}{each.activations / GIGA:8.1f}{each.gpu / GIGA:8.1f}" for name, each in plan.options.items()
    ]
    lines += ["", f"one step of {plan.step.total:.2f} s"]
    lines += [f"  {name:<26}{value:8.2f} s {value / plan.step.total:6.1%}" for name, value in _time_rows(plan.step)]
    lines += ["", "communication of a rank in a step"]
    for name, each in plan.step.traffic.items():
        if each.bytes:
            state = "hidden" if each.hidden else f"{each.exposed:.2f} s waited for"
            lines.append(f"  {name:<26}{each.bytes / GIGA:8.1f} GB {each.seconds:7.2f} s  {state}")
    return "\n".join(lines)


def comparison(plans: Sequence[Plan]) -> list[list[str]]:
    """One row per plan: layout, memory, step, MFU, days."""
    return [[describe(plan.layout), *_row(plan)] for plan in plans]


def _row(plan: Plan) -> list[str]:
    return [
        f"{plan.fullest.gpu / GIGA:.1f}",
        f"{plan.step.total:.2f}",
        f"{plan.utilisation:.1%}",
        f"{plan.days:.1f}",
        f"{plan.cost:,.0f}",
    ]


def plan_page(plan: Plan, cluster: Cluster, others: Mapping[str, Plan | None]) -> str:
    """Self-contained HTML: memory of every pipeline stage, the step, communication, what-if, constants, Helm values."""
    headline = [
        ("days", f"{plan.days:.1f}"),
        ("GPU-hours", f"{plan.gpu_hours:,.0f}"),
        (cluster.currency, f"{plan.cost:,.0f}"),
        ("MFU", f"{plan.utilisation:.1%}"),
        ("GB on the fullest GPU", f"{plan.fullest.gpu / GIGA:.1f}"),
    ]
    sections = [
        Section("plan", "Plan", [Prose(NOTE), Facts(_facts(plan, cluster), "What comes out.")]),
        Section("memory", "Memory", [_memory_figure(plan, cluster), _options(plan)]),
        Section("step", "One step", _step_blocks(plan)),
        Section("what-if", "What if", [_what_if(plan, others)]),
        Section("constants", "Constants", [_constants(cluster)]),
        Section(
            "values", "Helm values", [Preformatted(helm_values(cluster), "To merge into the values of charts/k2.")]
        ),
    ]
    return render_page(f"{cluster.name}: {cluster.gpus} GPUs", "K2 plan", headline, sections)


def helm_values(cluster: Cluster) -> str:
    """A pool of the whole cluster for pretraining, as chart and deployment file take it; one pod is one node."""
    cpu, memory = 8 * cluster.gpus_per_node, 0.8 * cluster.host_memory_gb
    pool = {
        "image": "gpu",
        "launch": "job",
        "nodes": cluster.nodes,
        "cpu": cpu,
        "memory": f"{memory:.0f}G",
        "accelerator": {"resource": "nvidia.com/gpu", "count": cluster.gpus_per_node},
        "queue": "k2-gpu",
        "cost_per_hour": cluster.price_per_gpu_hour * cluster.gpus_per_node,
    }
    quota = {"cpu": cpu * cluster.nodes, "memory": f"{memory * cluster.nodes:.0f}G", "nvidia.com/gpu": cluster.gpus}
    values = {"queues": {"k2-gpu": {"quota": quota}}, "pools": {"pretrain": pool}, "stages": {"pretrain": "pretrain"}}
    text: str = yaml.safe_dump({"deployment": values}, sort_keys=False)
    return text


def _facts(plan: Plan, cluster: Cluster) -> list[tuple[str, str]]:
    saving = plan.checkpointing
    between = saving.mean_time_between_failures_s
    return [
        ("layout", describe(plan.layout).replace(",", ", ")),
        ("steps", f"{plan.steps:,}"),
        ("step", f"{plan.step.total:.2f} s, at the long context {plan.long_step.total:.2f} s"),
        ("model FLOPs utilisation", f"{plan.utilisation:.1%}"),
        ("long context", _long(plan)),
        ("pipeline bubble", f"{plan.step.bubble / plan.step.total:.1%} of a step"),
        ("time", f"{plan.days:.1f} days, {plan.gpu_hours:,.0f} GPU-hours"),
        ("money", f"{plan.cost:,.0f} {cluster.currency}"),
        ("checkpoint", f"{saving.bytes / 1e12:.2f} TB, written in {duration(saving.write_s)}"),
        ("checkpoint_interval", f"{saving.interval_steps} steps ({duration(saving.interval_s)}; Young and Daly)"),
        ("weight sync", f"{duration(plan.sync_s)} from training to inference in FP8"),
        ("failures", f"one in {duration(between)} on average; {saving.lost:.2%} of the time is lost to them"),
    ]


def _long(plan: Plan) -> str:
    """What the long context needs, and what is different there."""
    now, then = (part.split(",") for part in (describe(plan.layout), describe(plan.long_layout)))
    changed = [field for field in then if field not in now]
    return f"{plan.long_fullest.gpu / GIGA:.1f} GB on the fullest GPU, with {', '.join(changed) or 'the same layout'}"


def _memory_rows(memory: Memory) -> list[tuple[str, float]]:
    plain = memory.as_dict()
    return [(name, plain[name] / GIGA) for name in (*COMPONENTS, "gpu", "host")]


def _time_rows(step: StepTime) -> list[tuple[str, float]]:
    names = ("compute", "recompute", "bubble", "newton_schulz", "states")
    plain = [(name.replace("newton_schulz", "Newton-Schulz"), getattr(step, name)) for name in names]
    return [*plain, ("exposed communication", step.exposed)]


def _memory_figure(plan: Plan, cluster: Cluster) -> Block:
    rows = [
        (f"stage {index}", [stage.as_dict()[name] / GIGA for name in COMPONENTS])
        for index, stage in enumerate(plan.stages)
    ]
    room = cluster.gpu.memory_gb - cluster.gpu.reserved_gb
    caption = f"GB on a rank of each pipeline stage; a GPU has {room:g} to give. Most in {plan.fullest.peak}."
    return Figure(stacked_bars("Memory by pipeline stage", COMPONENTS, rows), caption)


def _step_blocks(plan: Plan) -> list[Block]:
    step = plan.step
    traffic = [
        [name, f"{each.bytes / GIGA:.1f}", f"{each.seconds:.2f}", f"{each.exposed:.2f}"]
        for name, each in step.traffic.items()
    ]
    return [
        Figure(bars("One step", _time_rows(step)), "Seconds of one optimizer step by where they go."),
        Figure(stacked_bars("Timeline", TIMELINE, timeline(plan)), "One step of every pipeline stage, in seconds."),
        Table(["communication", "GB", "s", "s waited for"], traffic, "Of the busiest rank in one step."),
    ]


def timeline(plan: Plan) -> list[tuple[str, list[float]]]:
    """When each pipeline stage waits and works in a step of 1F1B: later stages begin later and end earlier."""
    step, stages = plan.step, plan.layout.pp
    hop = step.bubble / max(1, stages - 1)
    forward = hop * step.compute / 3 / (step.compute + step.recompute)
    work, update = step.compute + step.recompute, step.newton_schulz + step.states
    return [
        (
            f"stage {index}",
            [index * forward, work, (stages - 1 - index) * hop, index * (hop - forward), step.exposed, update],
        )
        for index in range(stages)
    ]


def _options(plan: Plan) -> Block:
    rows = [
        [name, *(f"{value / GIGA:.1f}" for value in (each.activations, each.working, each.gpu, each.host))]
        for name, each in plan.options.items()
    ]
    head = ["activations", "kept", "working", "GPU", "host"]
    return Table(head, rows, "GB on the fullest rank, by what becomes of activations.", text=True)


def _what_if(plan: Plan, others: Mapping[str, Plan | None]) -> Block:
    rows = [["as planned", *_row(plan)]]
    rows += [[name, *(_row(other) if other else ["does not fit", "", "", "", ""])] for name, other in others.items()]
    return Table(["case", "GB", "s a step", "MFU", "days", "cost"], rows, "The same plan under other circumstances.")


def _constants(cluster: Cluster) -> Block:
    rows = []
    for path, source in cluster.sources.items():
        value: object = cluster
        for name in path.split("."):
            value = getattr(value, name)
        shown = number(value) if isinstance(value, int | float) else str(value)
        rows.append([path, shown, source])
    return Table(["constant", "value", "source"], rows, "Every constant, and where it comes from.", text=True)
