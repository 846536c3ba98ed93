"""The trainings of a study as numbers: every arm over its seeds, against the reference arm seed by seed.

A seed decides the weights and the order of the data, so differences are paired by it. Intervals are Student's t over
the seeds, at 95%: wide for few seeds, as they should be.

Letters in shapes: S rows of a history, G points of a grid.
"""

from collections.abc import Callable, Mapping, Sequence
from math import exp, log, sqrt
from statistics import fmean, stdev
from typing import Any, TypeVar

import numpy as np
from scipy.stats import t as student

from k2.ablations.answers import RATES, Answers
from k2.ablations.training import LATE, Floats, Training
from k2.config.ablations import StudyConfig, run_label
from k2.model.layout import flops_per_token, parameter_counts

MAX_POINTS = 100
CONFIDENCE = 0.95
LONG_CONTEXT = 131_072
"""Tokens of the context at which the paper counts what heads cost in inference."""

Estimate = dict[str, Any]
Values = Sequence[float | None]
T = TypeVar("T")


def compare(study: StudyConfig, trainings: Mapping[str, Training]) -> dict[str, Any]:
    """Everything the table and the figures show, JSON-ready; `trainings` by label, those of the sweep included."""
    runs = by_arm(study, trainings)
    end = min(training.cost_S(study.axis)[-1] for group in runs.values() for training in group)
    grid_G = _grid(study, runs, end)
    reference = runs[study.reference]
    return _heading(study) | {
        "grid": grid_G.tolist(),
        "arms": [{"name": name} | _arm(study, group, reference, grid_G) for name, group in runs.items()],
        "sweep": {arm.name: _sweep(study, trainings, arm.name) for arm in study.arms} if study.sweep else {},
    }


def compare_answers(study: StudyConfig, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """The same of arms that answered held-out problems: pass rates, and their differences paired by seed."""
    runs = {name: [one.rates() for one in group] for name, group in by_arm(study, answers).items()}
    reference = runs[study.reference]
    arms = []
    for name, group in runs.items():
        values = {rate: [one[rate] for one in group] for rate in RATES}
        differences = {
            f"{rate}_difference": [one[rate] - other[rate] for one, other in zip(group, reference, strict=True)]
            for rate in RATES
        }
        arms.append({"name": name, "values": {key: estimate(each) for key, each in (values | differences).items()}})
    return _heading(study) | {"grid": [], "arms": arms, "sweep": {}}


def by_arm(study: StudyConfig, made: Mapping[str, T]) -> dict[str, list[T]]:
    """What was made by label, as one list over the seeds for each arm."""
    return {arm.name: [made[run_label(arm.name, seed)] for seed in study.seeds] for arm in study.arms}


def _heading(study: StudyConfig) -> dict[str, Any]:
    return {
        "name": study.name,
        "title": study.title,
        "question": study.question,
        "axis": study.axis,
        "reference": study.reference,
        "seeds": list(study.seeds),
        "columns": list(study.columns),
        "figures": list(study.curves),
    }


def estimate(values: Values) -> Estimate:
    """Mean and t interval over seeds. None among the values (a loss that was not reached) leaves them open."""
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "low": None, "high": None, "by_seed": list(values)}
    mean = fmean(known)
    half = student.ppf((1 + CONFIDENCE) / 2, len(known) - 1) * stdev(known) / sqrt(len(known))
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half), "by_seed": known}


def _arm(study: StudyConfig, group: list[Training], reference: list[Training], grid_G: Floats) -> dict[str, Any]:
    """Constants of the architecture, estimates, and curves of one arm."""
    model, context = group[0].config.model, group[0].config.context_length
    counts = parameter_counts(model)
    pairs = list(zip(group, reference, strict=True))
    values: dict[str, Values] = {name: [metric(training) for training in group] for name, metric in METRICS.items()}
    values["difference"] = [one.heldout_loss - other.heldout_loss for one, other in pairs]
    values["relative_difference"] = [one.heldout_loss / other.heldout_loss - 1 for one, other in pairs]
    losses = [_on_grid(study.axis, training, grid_G) for training in group]
    others = [_on_grid(study.axis, training, grid_G) for training in reference]
    ends = [(_loss_at(study.axis, one, grid_G[-1]), _loss_at(study.axis, other, grid_G[-1])) for one, other in pairs]
    values["loss_at_equal_cost"] = [loss for loss, _ in ends]
    values["difference_at_equal_cost"] = [loss - other for loss, other in ends]
    values["cost_ratio"] = [cost_ratio(study.axis, *pair) for pair in pairs]
    curves = {
        "loss": losses,
        "difference": [loss - other for loss, other in zip(losses, others, strict=True)],
        "max_logit": [_by_cell(study.axis, one, one.logit_S, grid_G, np.max) for one in group],
        "clipping": [_by_cell(study.axis, one, one.clipped_S, grid_G, np.mean) for one in group],
    }
    return {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": 3 * flops_per_token(model, context),
        "long_flops_per_token": flops_per_token(model, LONG_CONTEXT),
        "tuned": getattr(group[0].config, study.sweep.field) if study.sweep else None,
        "tau": group[0].config.optimizer.tau,
        "steps": group[0].config.steps,
        "values": {name: estimate(each) for name, each in values.items()},
        "curves": {name: _band(each) for name, each in curves.items()},
    }


METRICS: Mapping[str, Callable[[Training], float]] = {
    "heldout_loss": lambda one: one.heldout_loss,
    "max_logit": lambda one: float(one.logit_S.max()),
    "median_logit": lambda one: float(np.median(one.logit_S[-max(1, round(LATE * len(one.logit_S))) :])),
    "clipped_heads": lambda one: float((one.counts_NH > 0).mean()),
    "clipping_peak": lambda one: float(one.clipping_by_quarter().max()),
    "clipping_late": lambda one: float(one.clipping_by_quarter()[-1]),
    "clipping_end": lambda one: float(one.clipped_S[-max(1, len(one.clipped_S) // 10) :].mean()),
    "last_clip": lambda one: one.last_clip(),
}


def cost_ratio(axis: str, one: Training, reference: Training) -> float | None:
    """Cost at which `one` has the reference's last loss, as a share of the reference's; None if it never had.

    Losses are those of the fitted lines: where single batches decide when a loss is reached, a training reaches its own
    last loss at 90% of its length. Below one half the line is extrapolated.
    """
    intercept, slope = _line(axis, one)
    end = reference.cost_S(axis)[-1]
    at = exp((_loss_at(axis, reference, end) - intercept) / slope)
    return float(at / end) if at <= one.cost_S(axis)[-1] * (1 + 1e-9) else None


def _loss_at(axis: str, training: Training, cost: float) -> float:
    intercept, slope = _line(axis, training)
    return intercept + slope * log(cost)


def _line(axis: str, training: Training) -> tuple[float, float]:
    """Intercept and slope of the training loss over the logarithm of the cost, fitted to the second half."""
    half = len(training.raw_loss_S) // 2
    slope, intercept = np.polyfit(np.log(training.cost_S(axis)[half:]), training.raw_loss_S[half:], 1)
    return float(intercept), float(slope)


def _grid(study: StudyConfig, runs: Mapping[str, list[Training]], end: float) -> Floats:
    """Points of the axis up to the end that all trainings reach; every cell between them holds a step of each."""
    rows = min(int((one.cost_S(study.axis) <= end).sum()) for group in runs.values() for one in group)
    points = min(MAX_POINTS, rows)
    return np.linspace(0.0, end, points + 1)[1:]


def _on_grid(axis: str, training: Training, grid_G: Floats) -> Floats:
    return np.interp(grid_G, training.cost_S(axis), training.loss_S)


def _by_cell(
    axis: str, training: Training, values_S: Floats, grid_G: Floats, reduce: Callable[[Floats], float]
) -> Floats:
    """The values between neighbouring points of the grid as one, so that no peak is lost."""
    # Rounding must not push the step at the very end of a cell into the next one.
    cells_S = np.searchsorted(grid_G * (1 + 1e-9), training.cost_S(axis))
    return np.array([reduce(values_S[cells_S == cell]) for cell in range(len(grid_G))])


def _band(curves: Sequence[Floats]) -> dict[str, list[float]]:
    """Mean over the seeds, and the lowest and highest of them."""
    stacked = np.stack(curves)
    parts = {"mean": stacked.mean(axis=0), "low": stacked.min(axis=0), "high": stacked.max(axis=0)}
    return {name: [float(f"{value:.6g}") for value in values] for name, values in parts.items()}


def _sweep(study: StudyConfig, trainings: Mapping[str, Training], arm: str) -> dict[str, list[float]]:
    """Value -> held-out loss of each seed of the sweep."""
    sweep = study.sweep
    assert sweep is not None
    return {
        f"{value:g}": [trainings[run_label(arm, seed, value)].heldout_loss for seed in sweep.seeds]
        for value in sweep.values[arm]
    }
