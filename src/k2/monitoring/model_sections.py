"""Sections of the report on the model: pretraining, fine-tuning, RL, quantisation, evaluation and the gate.

Letters in comments: N layers.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from k2.monitoring.blocks import (
    Block,
    Figure,
    Prose,
    StageView,
    Table,
    clip,
    metric_facts,
)
from k2.monitoring.figures import Interval, Series, dot_plot, heatmap, line_chart
from k2.monitoring.format import number, value_text

Views = Mapping[str, StageView]

MANY_LAYERS = 8
"""From more layers on, curves of single layers would be a tangle, and their spread is drawn."""


def pretrain_section(views: Views) -> list[Block]:
    """Loss, learning rate, attention logits under tau, and the load of the experts."""
    view = views["pretrain"]
    return [
        _curve(view, "loss", "Training loss", "nats per token", zero=False),
        _heldout(view),
        _curve(view, "lr", "Learning rate", "learning rate", zero=True),
        _logits(view),
        *_heads(view),
        *_spectrum(view),
        _curve(view, "grad_norm", "Gradient norm", "2-norm", zero=True),
        _curve(view, "update_rms", "Update RMS before the learning rate", "RMS", zero=True),
        _experts(view),
        metric_facts(view, "Pretraining in numbers."),
    ]


def _x(view: StageView) -> tuple[Sequence[float], str]:
    """The axis of a stage's curves: tokens for pretraining, steps otherwise."""
    for name in ("tokens", "step") if view.name == "pretrain" else ("step",):
        values = view.get(f"curves.{name}")
        if values:
            return values, "tokens" if name == "tokens" else "step"
    lengths = [len(values) for values in (view.get("curves") or {}).values()]
    return list(range(1, max(lengths, default=0) + 1)), "step"


def _curve(view: StageView, name: str, title: str, y_label: str, *, zero: bool) -> Block:
    values = view.get(f"curves.{name}")
    x, x_label = _x(view)
    if not values or len(values) != len(x):
        return view.missing(f"{title.lower()} of {view.name}")
    chart = line_chart(title, x, [Series(name, values)], x_label=x_label, y_label=y_label, zero=zero)
    return Figure(chart, f"{title}.")


def _heldout(view: StageView) -> Block:
    rows = view.get("heldout")
    if not isinstance(rows, list) or not rows:
        return view.missing("held-out loss")
    cells = [[str(row["name"]), number(row["step"]), number(row["context"]), f"{row['loss']:.4f}"] for row in rows]
    return Table(("after phase", "step", "context", "loss"), cells, "Loss on documents that nothing was trained on.")


def _logits(view: StageView) -> Block:
    """Largest attention logit of each of N layers over time; spread of the layers when they are many."""
    rows, tau = view.get("curves.max_logits"), view.get("tau")
    x, x_label = _x(view)
    if not rows or len(rows) != len(x):
        return view.missing("attention logits")
    layers = list(zip(*rows, strict=True))
    if len(layers) < MANY_LAYERS:
        series = [Series(f"layer {index}", values) for index, values in enumerate(layers)]
    else:
        clean = [[v for v in row if v is not None] or [0.0] for row in rows]
        parts = (("maximum", max), ("median", statistics.median), ("minimum", min))
        series = [Series(name, [float(how(row)) for row in clean]) for name, how in parts]
    rule = None if tau is None else (float(tau), f"τ = {number(tau)}")
    title = "Largest attention logit per layer"
    chart = line_chart(title, x, series, x_label=x_label, y_label="logit", rule=rule, zero=True)
    clipped = view.metric("clipped_heads")
    text = "" if clipped is None else f" QK-Clip rescaled {number(clipped)} heads."
    return Figure(chart, f"{title}; QK-Clip keeps it near τ.{text}")


def _heads(view: StageView) -> list[Block]:
    """What QK-Clip saw of every head: a row per layer, a column per head."""
    logits, counts = view.get("head_logits"), view.get("clip_counts")
    if not logits or not counts:
        return [view.missing("heads")]
    heads = list(range(len(counts[0])))
    charts = (
        ("Largest logit of each head", [[value or 0.0 for value in row] for row in logits]),
        ("Times each head was clipped", [[float(value) for value in row] for row in counts]),
    )
    named = [(title, [(f"layer {i}", row) for i, row in enumerate(rows)]) for title, rows in charts]
    return [
        Figure(heatmap(title, heads, rows, x_label="head", low=0.0), f"{title}, over the whole run.")
        for title, rows in named
    ]


def _spectrum(view: StageView) -> list[Block]:
    """Largest spectral norm over all heads of each projection, where it was measured."""
    notes = view.get("spectral_norms")
    if not notes:
        return []
    series = [
        Series(name, [max(max(heads) for heads in note["norms"][name]) for note in notes])
        for name in sorted(notes[0]["norms"])
    ]
    title = "Largest spectral norm of a head's query and key rows"
    steps = [note["step"] for note in notes]
    return [Figure(line_chart(title, steps, series, x_label="step", y_label="norm", zero=True), f"{title}.")]


def _experts(view: StageView) -> Block:
    rows = view.get("curves.expert_load")
    x, x_label = _x(view)
    if not rows or not rows[0] or len(rows) != len(x):
        return view.missing("expert load")
    layers = list(zip(*rows, strict=True))
    named = [(f"MoE {index}", [value or 0.0 for value in values]) for index, values in enumerate(layers)]
    chart = heatmap("Load of the busiest expert", x, named, x_label=x_label, low=1.0)
    return Figure(chart, "Load of the busiest expert over the mean, per MoE layer; 1 is perfect balance.")


def sft_section(views: Views) -> list[Block]:
    """Supervised fine-tuning: its loss and what it reached."""
    view = views["sft"]
    curve = _curve(view, "loss", "Loss", "nats per token", zero=False)
    return [curve, metric_facts(view, "Fine-tuning in numbers.")]


def rl_section(views: Views) -> list[Block]:
    """Reward and held-out accuracy over the steps, and answers before and after."""
    view = views["rl"]
    blocks = [_curve(view, "reward", "Mean reward", "reward", zero=False), _accuracy(view)]
    examples = view.get("examples")
    if isinstance(examples, list) and examples:
        names = ("prompt", "before", "after", "passed")
        rows = [[value_text(row.get(name)) for name in names] for row in examples[:10]]
        blocks.append(Table(names, rows, "Held-out problems, answered greedily before and after.", text=True))
    return [*blocks, metric_facts(view, "RL in numbers.")]


def _accuracy(view: StageView) -> Block:
    """Held-out accuracy at the steps where it was measured, sampled and greedy."""
    notes = view.get("accuracy")
    if not isinstance(notes, list) or not notes:
        return view.missing("accuracy of RL")
    modes = [mode for mode in ("sampled", "greedy") if all(mode in note for note in notes)]
    series = [Series(mode, [note[mode]["accuracy"] for note in notes]) for mode in modes]
    chart = line_chart(
        "Held-out accuracy", [note["step"] for note in notes], series, x_label="step", y_label="accuracy", zero=True
    )
    return Figure(chart, f"Accuracy on held-out problems ({number(notes[-1][modes[0]]['n'])} at the end).")


def quantize_section(views: Views) -> list[Block]:
    """INT4: what rounding cost and what training won back."""
    view = views["quantize"]
    curve = _curve(view, "loss", "Divergence from the model before", "nats per token", zero=False)
    return [curve, metric_facts(view, "Quantisation in numbers.")]


def evaluation_section(views: Views) -> list[Block]:
    """Every score of every model side by side, with its 95% interval, and answers to read."""
    view = views["evaluate"]
    models, order = view.get("models"), view.get("order")
    if not models or not order:
        return [view.missing("scores")]
    tasks = sorted({task for scores in models.values() for task in scores})
    rates = [task for task in tasks if all(models[m][task]["high"] <= 1 for m in order if task in models[m])]
    blocks: list[Block] = []
    if rates:
        groups = [(task, [_interval(m, models[m][task]) for m in order if task in models[m]]) for task in rates]
        chart = dot_plot("Scores before and after", groups, x_label="score")
        blocks.append(Figure(chart, "Every task before and after, with 95% intervals."))
    rows = [[task, *(_score(models[name].get(task)) for name in order)] for task in tasks]
    blocks.append(Table(("task", *order), rows, "The same in numbers; below each value its 95% interval."))
    return [*blocks, _answers(view, order)]


def _answers(view: StageView, order: Sequence[str]) -> Block:
    """One problem of each task with the answer of every model."""
    samples = view.get("samples")
    if not samples or not all(samples.get(name) for name in order):
        return view.missing("answers of the models")
    columns = [samples[name] for name in order]
    rows, seen = [], set()
    for answers in zip(*columns, strict=True):
        if answers[0]["task"] not in seen:
            seen.add(answers[0]["task"])
            rows.append([clip(answers[0]["prompt"], 120), *(_answer(each) for each in answers)])
    return Table(
        ("problem", *order), rows, "A held-out problem of each task, answered greedily by every model.", text=True
    )


def _answer(sample: Mapping[str, Any]) -> str:
    return f"{'✓' if sample['score'] >= 1 else '✗'} {clip(sample['answer'], 120)}"


def _interval(name: str, score: Mapping[str, Any]) -> Interval:
    return Interval(name, score["value"], score["low"], score["high"])


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    form = "{:.3f}" if score["high"] <= 1 else "{:.4g}"
    value, low, high = (form.format(score[name]) for name in ("value", "low", "high"))
    return f"{value}\n{low} – {high}"


def gate_section(views: Views) -> list[Block]:
    """What the gate decided, and every check that led there."""
    view = views["gate"]
    promote = view.get("promote")
    if promote is None:
        return [view.missing("the gate's decision")]
    champion = views["promote"].metric("champion") or "nobody"
    verdict = "The candidate passed" if promote else "The candidate was not promoted"
    blocks: list[Block] = [Prose(f"{verdict}. The alias {view.get('alias')} points at {champion}.")]
    reasons = view.get("reasons") or []
    blocks.append(Table(("check",), [[str(reason)] for reason in reasons], "Checks of the gate.", text=True))
    return blocks
