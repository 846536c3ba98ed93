"""The study of RL against more supervision as numbers, a figure and a page.

Held-out problems are drawn with repetition, and five trainings are few, so intervals resample at two levels: seeds, and
within a seed its distinct problems with all their answers.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from k2.evaluation.harness import MODES
from k2.monitoring.figures import Interval, dot_plot
from k2.monitoring.standalone import html_page, html_table, svg_file
from k2.rl.ablation import ARMS

ENTRIES = ("plateau", "sft", "rejection", "rl")
PAIRS = [(one, other) for other, one in combinations(ENTRIES, 2)]
"""Differences are taken of the first less the second."""

PARTS = {"covered": True, "uncovered": False}
RESAMPLES = 2000

Result = Mapping[str, Any]
Units = list[NDArray[np.float64]]
"""Per seed an array of shape [distinct problems, 2]: the sum over a problem's answers, and their number."""


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """All scores, paired differences of every two arms, and CPU seconds, whatever they show.

    A difference `a-b` is the pass rate of a less that of b on the same problems. `cpu_spread` is how much more CPU time
    the dearest arm took than the cheapest, over all seeds.
    """
    table: dict[str, Any] = {"seeds": [r["seed"] for r in results], "scores": {}, "differences": {}, "items": {}}
    for part, flag in PARTS.items():
        groups = [_problems(result, flag) for result in results]
        table["items"][part] = {
            "answers": sum(map(len, (index for group in groups for index in group))),
            "distinct": sum(map(len, groups)),
        }
        table["scores"][part] = {
            f"{entry}/{mode}": _estimate(_units(results, groups, mode, entry)) for entry in ENTRIES for mode in MODES
        }
        table["differences"][part] = {
            f"{one}-{other}/{mode}": _estimate(_units(results, groups, mode, one, other))
            for one, other in PAIRS
            for mode in MODES
        }
    cpu = {entry: [result["cpu_s"][entry] for result in results] for entry in ENTRIES}
    arms = [sum(cpu[arm]) for arm in ARMS]
    return table | {"cpu_s": cpu, "cpu_spread": max(arms) / min(arms) - 1}


def _problems(result: Result, flag: bool) -> list[list[int]]:
    """Positions of the answers to each distinct problem on one side."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, (prompt, inside) in enumerate(zip(result["prompts"], result["covered"], strict=True)):
        if inside == flag:
            found[prompt].append(index)
    return list(found.values())


def _units(
    results: Sequence[Result], groups: Sequence[list[list[int]]], mode: str, entry: str, other: str | None = None
) -> Units:
    units = []
    for result, group in zip(results, groups, strict=True):
        values = np.array(result[entry][mode], dtype=np.float64)
        if other is not None:
            values -= np.array(result[other][mode], dtype=np.float64)
        units.append(np.array([[values[index].sum(), len(index)] for index in group]).reshape(-1, 2))
    return units


def _estimate(units: Units) -> dict[str, Any]:
    """Mean, two-level bootstrap interval at 95%, and the mean of each seed."""
    random = np.random.default_rng(0)
    means = [
        _mean([_resampled(units[i], random) for i in random.integers(0, len(units), len(units))])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": _mean(units), "low": float(low), "high": float(high), "by_seed": [_mean([unit]) for unit in units]}


def _resampled(unit: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    return unit[random.integers(0, len(unit), len(unit))]


def _mean(units: Units) -> float:
    total, count = np.sum([unit.sum(axis=0) for unit in units], axis=0)
    return float(total / count)


def figure(table: Mapping[str, Any]) -> Markup:
    """Pass rates of the plateau and the arms, covered and uncovered, sampled and greedy, as one SVG file."""
    groups = [
        (f"{part}, {mode}", [_interval(entry, table["scores"][part][f"{entry}/{mode}"]) for entry in ENTRIES])
        for part in PARTS
        for mode in MODES
    ]
    return svg_file(dot_plot("RL against more supervision", groups, x_label="held-out pass rate, 95% interval"))


def _interval(name: str, score: Mapping[str, float]) -> Interval:
    return Interval(name, score["mean"], score["low"], score["high"])


def rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of the result: scores, then differences, then CPU seconds."""
    parts = [(part, mode) for part in PARTS for mode in MODES]
    header = ["", *(f"{part}, {mode}" for part, mode in parts)]
    body = [
        [f"{name} - {other}" if other else name]
        + [_cell(table[kind][part][f"{name}-{other}/{mode}" if other else f"{name}/{mode}"]) for part, mode in parts]
        for kind, name, other in _lines()
    ]
    return [header, *body]


def _lines() -> list[tuple[str, str, str]]:
    return [*(("scores", entry, "") for entry in ENTRIES), *(("differences", *pair) for pair in PAIRS)]


def _cell(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def cpu_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of the measured CPU seconds."""
    body = [[entry, *(f"{s:.1f}" for s in table["cpu_s"][entry])] for entry in ENTRIES]
    return [["CPU seconds", *(f"seed {seed}" for seed in table["seeds"])], *body]


def page(table: Mapping[str, Any]) -> str:
    """The figure and both tables as one self-contained HTML page."""
    spread = Markup("<p>CPU time of the arms agrees within {:.1%} (sums over seeds).</p>").format(table["cpu_spread"])
    tables = html_table(rows(table)), spread, html_table(cpu_rows(table))
    return html_page("RL against more supervision", figure(table), *tables)
