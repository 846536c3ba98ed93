"""Charts: well-formed, self-contained SVG whose marks are where the numbers say."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from k2.monitoring.figures import Interval, Series, bars, dot_plot, heatmap, histogram, line_chart, thin, ticks

NASTY = "<script>\"'&"
finite = st.floats(-1e12, 1e12)


def parse(svg: Markup) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    for element in root.iter():
        assert not any("http" in value for value in element.attrib.values())
        for name in ("x", "y", "cx", "cy", "width", "height"):
            assert math.isfinite(float(element.get(name) or 0))
    return root


@pytest.mark.parametrize(
    "make",
    [
        lambda: line_chart(NASTY, [1, 2], [Series(NASTY, [1.0, None])], x_label=NASTY, y_label=NASTY, rule=(2, NASTY)),
        lambda: bars(NASTY, [(NASTY, 3.0), ("b", 0.0)]),
        lambda: bars("nothing", [("a", 0)]),
        lambda: dot_plot(NASTY, [(NASTY, [Interval(NASTY, 0.5, 0.4, 0.6)])], x_label=NASTY),
        lambda: heatmap(NASTY, [1, 2], [(NASTY, [1.0, 2.0])], x_label=NASTY, low=1.0),
        lambda: heatmap("flat", [1], [("a", [1.0])], x_label="x", low=1.0),
        lambda: histogram(NASTY, [0.0, 0.5, 1.0], [3, 1], x_label=NASTY),
    ],
)
def test_every_chart_is_well_formed_and_escapes_its_texts(make: Callable[[], Markup]) -> None:
    svg = make()
    parse(svg)
    assert "<script" not in svg


@given(st.lists(st.one_of(st.none(), finite), min_size=1, max_size=400))
def test_any_curve_is_drawn(values: list[float | None]) -> None:
    svg = line_chart("t", list(range(len(values))), [Series("s", values)], x_label="x", y_label="y", rule=(5.0, "r"))
    data = json.loads(parse(svg).get("data-chart") or "")
    assert len(data["x"]) == len(data["series"][0]["values"]) <= 240
    for _, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg):
        assert 13 <= float(y) <= 213


@given(finite, finite)
def test_ticks_span_the_data_in_equal_round_steps(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high)
    slack = max(1e-30, 1e-6 * max(abs(low), abs(high)))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= 8
    steps = [after - before for before, after in pairwise(marks)]
    assert min(steps) > 0
    assert max(steps) == pytest.approx(min(steps), rel=1e-3, abs=slack)


def test_the_line_is_where_the_numbers_say() -> None:
    svg = line_chart("t", [0, 10], [Series("s", [0.0, 100.0])], x_label="x", y_label="y")
    assert 'd="M62.0 212.0L556.0 14.0"' in svg


def test_a_gap_splits_the_line() -> None:
    svg = line_chart("t", [0, 1, 2, 3], [Series("s", [1.0, None, 2.0, 3.0])], x_label="x", y_label="y")
    path = re.search(r' d="([^"]*)"', svg)
    assert path is not None
    assert (path[1].count("M"), path[1].count("L")) == (2, 1)


def test_a_rule_far_above_the_data_is_named_and_does_not_flatten_it() -> None:
    near = line_chart("t", [0, 1], [Series("s", [0.0, 50.0])], x_label="x", y_label="y", rule=(100.0, "τ = 100"))
    far = line_chart("t", [0, 1], [Series("s", [0.0, 5.0])], x_label="x", y_label="y", rule=(100.0, "τ = 100"))
    assert 'class="rule"' in near
    assert 'class="rule"' not in far
    assert "τ = 100, above this scale" in far


def test_names_at_the_ends_of_curves_do_not_overlap() -> None:
    series = [Series(f"layer {index}", [0.0, 1.0 + index / 1000]) for index in range(6)]
    root = parse(line_chart("t", [0, 1], series, x_label="x", y_label="y"))
    heights = sorted(float(e.get("y") or 0) for e in root.iter() if "name" in (e.get("class") or ""))
    assert min(after - before for before, after in pairwise(heights)) >= 12


def test_the_darkest_cell_is_the_maximum() -> None:
    root = parse(heatmap("t", [1, 2, 3], [("a", [1.0, 2.0, 4.0])], x_label="x", low=1.0))
    shades = [float(e.get("fill-opacity") or 0) for e in root.iter() if e.get("class") == "cell"]
    assert shades == pytest.approx([0.06, 0.37, 1.0], abs=0.01)


@given(st.integers(1, 5000), st.integers(2, 300))
def test_thinning_keeps_order_and_both_ends(count: int, limit: int) -> None:
    kept = thin(count, limit)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert len(kept) == min(count, limit)
