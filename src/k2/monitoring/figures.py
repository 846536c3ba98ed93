"""Small charts as inline SVG: no library, no external resource, colours from the page's style sheet."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from k2.monitoring.format import number

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 84, 14, 38
MAX_POINTS = 240
"""Points drawn of a curve; more would not be seen."""

COLOURS = 8

TINY = 1e-30
"""Differences below are drawn as none."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One named curve; None leaves a gap. `low` and `high` bound a band around it, without gaps."""

    name: str
    values: Values
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Interval:
    """A value with its interval, for `dot_plot`."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Scale:
    """Linear map of [low, high] onto pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span [low, high], about `count` of them; a flat range gets the step of its own size."""
    size, span = max(abs(low), abs(high)), high - low
    if span <= max(1e-9 * size, TINY):
        span = size if size > TINY else 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if span / (step * power) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def thin(count: int, limit: int = MAX_POINTS) -> list[int]:
    """Evenly spaced positions of a curve, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def line_chart(
    title: str,
    x: Sequence[float],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    rule: tuple[float, str] | None = None,
    zero: bool = False,
    log: bool = False,
) -> Markup:
    """Curves over a common x axis, named at their ends; `rule` is a labelled horizontal line.

    A rule that is far above the data is left out of the scale, and named in the corner. `log` takes values above 0.
    """
    keep = thin(len(x))
    x, series = [x[i] for i in keep], [_kept(s, keep) for s in series]
    if log:
        return _log_chart(title, x, series, x_label, y_label)
    points = [v for s in series for v in (*s.values, *s.low, *s.high) if v is not None] or [0.0]
    low, high = min(0.0, *points) if zero else min(points), max(points)
    fits = rule is not None and rule[0] <= low + 4 * ((high - low) or 1.0)
    marks = ticks(min(low, rule[0]) if rule and fits else low, max(high, rule[0]) if rule and fits else high)
    across = _Scale(x[0], x[-1] if x[-1] > x[0] else x[0] + 1, LEFT, WIDTH - RIGHT)
    up = _Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, up, ticks(x[0], x[-1], 6), marks, x_label, y_label)]
    if rule:
        parts.append(_rule(rule, up(rule[0]) if fits else None))
    parts += _curves(x, series, across, up)
    return _chart(title, x, series, x_label, parts)


def _log_chart(title: str, x: Sequence[float], series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """The curves over powers of ten."""
    logs = [Series(s.name, _log10(s.values), *(_floats(_log10(side)) for side in (s.low, s.high))) for s in series]
    points = [v for s in logs for v in (*s.values, *s.low, *s.high) if v is not None]
    marks = [float(power) for power in range(math.floor(min(points)), max(1, math.ceil(max(points))) + 1)]
    across = _Scale(x[0], x[-1] if x[-1] > x[0] else x[0] + 1, LEFT, WIDTH - RIGHT)
    up = _Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, up, ticks(x[0], x[-1], 6), marks, x_label, y_label, lambda mark: number(10**mark))]
    return _chart(title, x, series, x_label, parts + _curves(x, logs, across, up))


def _log10(values: Values) -> list[float | None]:
    return [None if value is None else math.log10(value) for value in values]


def _floats(values: Values) -> list[float]:
    return [value for value in values if value is not None]


def _kept(series: Series, keep: Sequence[int]) -> Series:
    low, high = ([side[i] for i in keep] if side else [] for side in (series.low, series.high))
    return Series(series.name, [series.values[i] for i in keep], low, high)


def _curves(x: Sequence[float], series: Sequence[Series], across: _Scale, up: _Scale) -> list[Markup]:
    """Bands below curves below names."""
    bands = [_band(index, x, each, across, up) for index, each in enumerate(series) if each.low]
    return bands + [_curve(i, x, each, across, up) for i, each in enumerate(series)] + _end_labels(series, up)


def _band(index: int, x: Sequence[float], series: Series, across: _Scale, up: _Scale) -> Markup:
    edge = [*zip(x, series.high, strict=True), *reversed(list(zip(x, series.low, strict=True)))]
    points = " ".join(f"{across(position)},{up(value)}" for position, value in edge)
    return Markup('<polygon class="band s{}" points="{}"/>').format(index % COLOURS, points)


def _chart(title: str, x: Sequence[float], series: Sequence[Series], x_label: str, parts: Sequence[Markup]) -> Markup:
    """The figure with the data that the page's script reads under the pointer."""
    data = {
        "x": list(x),
        "label": x_label,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "series": [
            {"name": s.name, "values": [None if v is None else float(f"{v:.5g}") for v in s.values]} for s in series
        ],
    }
    return _svg(title, HEIGHT, parts, "chart", json.dumps(data, separators=(",", ":")))


def _rounded(values: Values) -> list[float | None]:
    return [None if value is None else float(f"{value:.5g}") for value in values]


def _axes(
    across: _Scale,
    up: _Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str] = number,
) -> Iterator[Markup]:
    for value in y_ticks:
        y = up(value)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        yield _text(LEFT - 7, y + 4, y_text(value), "tick end")
    for value in x_ticks:
        if across.low <= value <= across.high:
            yield _text(across(value), HEIGHT - BOTTOM + 16, number(value), "tick middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "axis middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield Markup('<text class="axis middle" transform="translate(12 {}) rotate(-90)">{}</text>').format(middle, y_label)


def _rule(rule: tuple[float, str], y: float | None) -> Markup:
    if y is None:
        return _text(WIDTH - RIGHT, TOP + 4, f"{rule[1]}, above this scale", "rule-label end")
    line = Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y)
    return line + _text(LEFT + 6, y - 5, rule[1], "rule-label")


def _curve(index: int, x: Sequence[float], series: Series, across: _Scale, up: _Scale) -> Markup:
    """One path; a gap starts a new stroke. A single point is a dot."""
    path, pen = [], "M"
    for position, value in zip(x, series.values, strict=True):
        if value is None:
            pen = "M"
            continue
        path.append(f"{pen}{across(position)} {up(value)}")
        pen = "L"
    if len(path) == 1:
        spot = path[0][1:].split()
        return Markup('<circle class="s{}" cx="{}" cy="{}" r="3"/>').format(index % COLOURS, *spot)
    return Markup('<path class="curve s{}" d="{}"/>').format(index % COLOURS, "".join(path))


def _end_labels(series: Sequence[Series], up: _Scale) -> list[Markup]:
    """Names at the right end of the curves, moved apart where they would overlap."""
    ends = []
    for index, each in enumerate(series):
        last = next((v for v in reversed(each.values) if v is not None), None)
        if last is not None:
            ends.append((up(last), index, each.name))
    labels, floor = [], -math.inf
    for y, index, name in sorted(ends):
        floor = max(y, floor + 12)
        labels.append(_text(WIDTH - RIGHT + 6, floor + 4, name, f"name s{index % COLOURS}"))
    return labels


def dot_plot(title: str, groups: Sequence[tuple[str, Sequence[Interval]]], *, x_label: str) -> Markup:
    """Values with intervals, one band per group, on one axis: before and after, side by side."""
    left, right = 190, WIDTH - 16
    bands = [14 * len(items) + 14 for _, items in groups]
    height = sum(bands) + 60
    marks = ticks(min(i.low for _, items in groups for i in items), max(i.high for _, items in groups for i in items))
    across = _Scale(marks[0], marks[-1], left, right)
    parts: list[Markup] = []
    for value in marks:
        x = across(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="24" y2="{}"/>').format(x, x, height - 34))
        parts.append(_text(x, height - 20, number(value), "tick middle"))
    parts.append(_text((left + right) / 2, height - 4, x_label, "axis middle"))
    parts += _legend([item.name for item in max((items for _, items in groups), key=len)], left)
    top = 28.0
    for (name, items), band in zip(groups, bands, strict=True):
        parts.append(_text(left - 12, top + (band - 14) / 2 + 4, _label(name), "label end"))
        parts += [_dot(index, item, across, top + 14 * index + 7) for index, item in enumerate(items)]
        top += band
    return _svg(title, height, parts)


def _legend(names: Sequence[str], left: float) -> list[Markup]:
    """Names in the colours of their marks, in one line."""
    labels = []
    for index, name in enumerate(names):
        labels.append(_text(left, 12, f"● {name}", f"name s{index % COLOURS}"))
        left += 7 * len(name) + 22
    return labels


def _label(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _dot(index: int, item: Interval, across: _Scale, y: float) -> Markup:
    text = f"{item.name}: {number(item.value)} [{number(item.low)}, {number(item.high)}]"
    return Markup(
        '<g class="s{i}"><title>{text}</title><line class="whisker" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
        '<circle cx="{x}" cy="{y}" r="3.6"/></g>'
    ).format(i=index % COLOURS, text=text, low=across(item.low), high=across(item.high), x=across(item.value), y=y)


def bars(title: str, rows: Sequence[tuple[str, float]]) -> Markup:
    """Horizontal bars with their values, in the order given."""
    left, right = 190, WIDTH - 70
    across = _Scale(0.0, max([value for _, value in rows] + [1e-12]), left, right)
    parts = []
    for index, (name, value) in enumerate(rows):
        y = 22 * index + 4
        parts.append(_text(left - 12, y + 13, _label(name), "label end"))
        box = '<rect class="bar" x="{}" y="{}" width="{}" height="15" rx="2"/>'
        parts.append(Markup(box).format(left, y, max(1.0, round(across(value) - left, 1))))
        parts.append(_text(across(value) + 7, y + 12, number(value), "tick"))
    return _svg(title, 22 * len(rows) + 8, parts)


def stacked_bars(title: str, parts: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """One bar per row, divided into the named parts, with its sum."""
    left, right = 150, WIDTH - 70
    across = _Scale(0.0, max([sum(values) for _, values in rows] + [1e-12]), left, right)
    marks = _legend(parts, left)
    box = '<rect class="part s{}" x="{}" y="{}" width="{:.1f}" height="15"><title>{}</title></rect>'
    for index, (name, values) in enumerate(rows):
        y, start = 22 * index + 24, 0.0
        marks.append(_text(left - 12, y + 13, _label(name), "label end"))
        for part, value in enumerate(values):
            wide = across(start + value) - across(start)
            marks.append(Markup(box).format(part, across(start), y, wide, f"{parts[part]}: {number(value)}"))
            start += value
        marks.append(_text(across(start) + 7, y + 12, number(start), "tick"))
    return _svg(title, 22 * len(rows) + 28, marks)


def histogram(title: str, edges: Sequence[float], counts: Sequence[float], *, x_label: str) -> Markup:
    """How many values fall between neighbouring `edges`, one more of them than `counts`."""
    marks = [mark for mark in ticks(0, max(counts), 4) if mark == int(mark)]
    across, up = _Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT), _Scale(0, marks[-1], HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, up, ticks(edges[0], edges[-1], 6), marks, x_label, "count")]
    box = '<rect class="bar" x="{}" y="{}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, y = across(low), up(count)
        parts.append(Markup(box).format(x, y, across(high) - x - 1, HEIGHT - BOTTOM - y, number(count)))
    return _svg(title, HEIGHT, parts)


def heatmap(
    title: str, x: Sequence[float], rows: Sequence[tuple[str, Sequence[float]]], *, x_label: str, low: float
) -> Markup:
    """One row of cells per name; a cell is as dark as its value lies above `low`, the darkest is the maximum."""
    keep = thin(len(x), 80)
    high = max([values[i] for _, values in rows for i in keep] + [low * 1.0001])
    tall = max(6, min(24, 240 // len(rows)))
    right, wide = WIDTH - RIGHT, (WIDTH - RIGHT - LEFT) / len(keep)
    parts = []
    for row, (name, values) in enumerate(rows):
        if tall >= 11:
            parts.append(_text(LEFT - 7, row * tall + tall / 2 + 4, name, "tick end"))
        for column, index in enumerate(keep):
            shade = round(0.06 + 0.94 * max(0.0, values[index] - low) / (high - low), 2)
            parts.append(_cell(LEFT + column * wide, row * tall, wide, tall, shade, f"{name}: {number(values[index])}"))
    bottom = tall * len(rows)
    for place, index in (("start", 0), ("end", len(x) - 1)):
        parts.append(_text(LEFT if place == "start" else right, bottom + 15, number(x[index]), f"tick {place}"))
    parts.append(_text((LEFT + right) / 2, bottom + 15, x_label, "axis middle"))
    parts += [_text(right + 8, 11, f"■ {number(high)}", "name s0"), _text(right + 8, 25, f"□ {number(low)}", "name")]
    return _svg(title, bottom + 22, parts)


def _cell(x: float, y: float, wide: float, tall: float, shade: float, text: str) -> Markup:
    box = '<rect class="cell" x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill-opacity="{}"><title>{}</title></rect>'
    return Markup(box).format(x, y, wide + 0.2, tall - 1, shade, text)


def _text(x: float, y: float, text: str, classes: str) -> Markup:
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(round(x, 1), round(y, 1), classes, text)


def _svg(title: str, height: float, parts: Sequence[Markup], kind: str = "", data: str = "") -> Markup:
    attributes = Markup(' class="{}" data-chart="{}"').format(kind, data) if data else Markup("")
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}"{}>')
    return head.format(WIDTH, height, title, attributes) + Markup("").join(parts) + Markup("</svg>")
