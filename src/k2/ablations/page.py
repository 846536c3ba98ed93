"""A study for its readers: table, figures, Markdown, HTML, and its section of a run's report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from k2.monitoring.blocks import Block, Figure, Prose, StageView, Table
from k2.monitoring.figures import Interval, Series, dot_plot, line_chart
from k2.monitoring.format import number, short
from k2.monitoring.standalone import html_page, html_table, markdown_table, svg_file

Study = Mapping[str, Any]
"""What `k2.ablations.comparison.compare` returns."""

AXES = {"tokens": "tokens", "flops": "training FLOPs"}

CURVES = {
    "loss": ("Training loss", "nats per token, smoothed"),
    "difference": ("Training loss less that of the reference", "nats per token"),
    "max_logit": ("Largest attention logit", "logit, powers of ten"),
    "clipping": ("Heads that QK-Clip scaled", "share of heads per step"),
}
"""Title and label of the vertical axis."""

NOTE = "Lines are means over the seeds, bands reach from the lowest seed to the highest."
INTERVALS = "Mean [95% t interval over the seeds]; differences and ratios are paired by seed."
LINES = (
    " Training losses at a cost, and costs to a loss, are read from a line of the loss over the logarithm of the cost,"
    " fitted to the second half."
)


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", short),
    "active_parameters": ("active parameters", short),
    "flops_per_token": ("training FLOPs per token", short),
    "long_flops_per_token": ("forward FLOPs per token at 128k tokens", short),
    "tuned": ("tuned value", number),
    "heldout_loss": ("held-out loss", _fixed(3)),
    "difference": ("held-out loss − {reference}", _fixed(3)),
    "relative_difference": ("the same in percent", lambda value: f"{value:+.1%}"),
    "loss_at_equal_cost": ("training loss at equal {axis}", _fixed(3)),
    "difference_at_equal_cost": ("that − {reference}", _fixed(3)),
    "cost_ratio": ("{axis} to the last loss of {reference}", _percent),
    "max_logit": ("largest logit", _fixed(0)),
    "median_logit": ("median over the last quarter's steps", _fixed(0)),
    "clipped_heads": ("heads ever clipped", _percent),
    "clipping_peak": ("heads clipped per step, busiest quarter", _percent),
    "clipping_late": ("heads clipped per step, last quarter", _percent),
    "clipping_end": ("heads clipped per step, last tenth", _percent),
    "last_clip": ("last clip after", _percent),
    "covered_sampled": ("covered, sampled", _fixed(3)),
    "covered_greedy": ("covered, greedy", _fixed(3)),
    "uncovered_sampled": ("uncovered, sampled", _fixed(3)),
    "uncovered_greedy": ("uncovered, greedy", _fixed(3)),
    "covered_sampled_difference": ("covered, sampled − {reference}", _fixed(3)),
    "covered_greedy_difference": ("covered, greedy − {reference}", _fixed(3)),
    "uncovered_sampled_difference": ("uncovered, sampled − {reference}", _fixed(3)),
    "uncovered_greedy_difference": ("uncovered, greedy − {reference}", _fixed(3)),
}
"""Heading and format of a column."""


def rows(study: Study) -> list[list[str]]:
    """Header and one row per arm."""
    names = {"reference": study["reference"], "axis": AXES[study["axis"]]}
    header = ["arm", *(COLUMNS[column][0].format(**names) for column in study["columns"])]
    return [header, *([name, *(_cell(arm, column) for column in study["columns"])] for name, arm in _arms(study))]


def sweep_rows(study: Study) -> list[list[str]]:
    """Header and one row per arm of the sweep's held-out losses; empty without a sweep."""
    if not study["sweep"]:
        return []
    values = sorted({value for arm in study["sweep"].values() for value in arm}, key=float)
    body = [
        [name, *(", ".join(f"{loss:.3f}" for loss in study["sweep"][name].get(value, [])) for value in values)]
        for name, _ in _arms(study)
    ]
    return [["held-out loss at", *values], *body]


def _arms(study: Study) -> list[tuple[str, Mapping[str, Any]]]:
    return [(arm["name"], arm) for arm in study["arms"]]


def _cell(arm: Mapping[str, Any], column: str) -> str:
    text = COLUMNS[column][1]
    if column not in arm["values"]:
        return text(arm[column])
    value = arm["values"][column]
    if value["mean"] is None:
        reached = [text(each) for each in value["by_seed"] if each is not None]
        return f"reached by {len(reached)} of {len(value['by_seed'])} seeds" + (
            f": {', '.join(reached)}" if reached else ""
        )
    spread = value["high"] - value["low"]
    return text(value["mean"]) + (f" [{text(value['low'])}, {text(value['high'])}]" if spread else "")


def figures(study: Study) -> dict[str, Markup]:
    """Every figure by name: pass rates, or differences of held-out losses and the curves that the study asks for."""
    if _answered(study):
        return {"pass_rates": _pass_rates(study)}
    title, label = f"{study['title']}: held-out loss", f"nats per token less {study['reference']}'s"
    differences = [_interval(name, arm["values"]["difference"]) for name, arm in _arms(study)]
    heldout = dot_plot(title, [("held-out loss", differences)], x_label=label)
    return {"heldout": heldout} | {name: _curve(study, name) for name in study["figures"]}


def _answered(study: Study) -> bool:
    """Whether arms answered problems; else they were pretrained."""
    return list(study["figures"]) == ["pass_rates"]


def _pass_rates(study: Study) -> Markup:
    groups = [
        (COLUMNS[rate][0], [_interval(name, arm["values"][rate]) for name, arm in _arms(study)])
        for rate in ("covered_sampled", "covered_greedy", "uncovered_sampled", "uncovered_greedy")
    ]
    return dot_plot(study["title"], groups, x_label="held-out pass rate")


def _intervals(study: Study) -> str:
    return INTERVALS if _answered(study) else INTERVALS + LINES


def _interval(name: str, value: Mapping[str, Any]) -> Interval:
    return Interval(name, value["mean"], value["low"], value["high"])


def _curve(study: Study, name: str) -> Markup:
    title, y_label = CURVES[name]
    series = [Series(arm, **_sides(values["curves"][name])) for arm, values in _arms(study)]
    axis = AXES[study["axis"]]
    return line_chart(title, study["grid"], series, x_label=axis, y_label=y_label, log=name == "max_logit")


def _sides(curve: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {"values": curve["mean"], "low": curve["low"], "high": curve["high"]}


def caption(study: Study, name: str) -> str:
    """What a figure shows."""
    if name == "pass_rates":
        return f"Held-out pass rates: mean and 95% t interval over {len(study['seeds'])} seeds."
    if name == "heldout":
        less = f"less that of {study['reference']}, paired by seed"
        return f"Held-out loss at the end {less}: mean and 95% t interval over {len(study['seeds'])} seeds."
    title = CURVES[name][0]
    return f"{title} over {AXES[study['axis']]}. {NOTE}"


def markdown(study: Study) -> str:
    """The study's result as a page with links to its figures, without a reading of it."""
    lines = [f"# {study['title']}", "", study["question"], "", markdown_table(rows(study)), _intervals(study), ""]
    if study["sweep"]:
        lines += ["Tuned on seeds of its own:", "", markdown_table(sweep_rows(study))]
    for name in figures(study):
        lines += [f"![{caption(study, name)}]({study['name']}.{name}.svg)", ""]
    return "\n".join(lines)


def page(study: Study) -> str:
    """The same as one self-contained HTML page."""
    tables = [html_table(table) for table in (rows(study), sweep_rows(study)) if table]
    drawn = [svg_file(svg) + _paragraph(caption(study, name)) for name, svg in figures(study).items()]
    return html_page(study["title"], _paragraph(study["question"]), *tables, _paragraph(_intervals(study)), *drawn)


def _paragraph(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def files(study: Study) -> dict[str, str]:
    """The study's files by name: Markdown, HTML and one SVG per figure."""
    name = study["name"]
    drawn = {f"{name}.{figure}.svg": f"{svg_file(svg)}\n" for figure, svg in figures(study).items()}
    return drawn | {f"{name}.md": markdown(study), f"{name}.html": page(study)}


def study_section(view: StageView) -> Sequence[Block]:
    """The study in a run's report."""
    study = view.report
    header, *body = rows(study)
    blocks: list[Block] = [Prose(study["question"]), Table(header, body, _intervals(study))]
    if study["sweep"]:
        header, *body = sweep_rows(study)
        blocks.append(Table(header, body, "Tuned on seeds of its own."))
    return [*blocks, *(Figure(svg, caption(study, name)) for name, svg in figures(study).items())]
