"""The numbers of a study, against trainings whose answer is known."""

import json
from math import log
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from k2.ablations.comparison import compare, cost_ratio, estimate
from k2.ablations.page import files, rows, sweep_rows
from k2.ablations.training import Training, training_of
from k2.config.ablations import ArmConfig, StudyConfig, SweepConfig
from k2.config.load import load_config

NANO = load_config("nano").pretrain
STEPS, BATCH = 40, 1024


def report(losses: list[float], logits: list[float] | None = None, clipped: list[int] | None = None) -> dict[str, Any]:
    """What the stage `pretrain` would have left: one row per step, two layers of two heads."""
    count = len(losses)
    return {
        "curves": {
            "step": list(range(1, count + 1)),
            "tokens": [BATCH * (i + 1) for i in range(count)],
            "cross_entropy": losses,
            "max_logits": [[logit / 2, logit] for logit in logits or [1.0] * count],
            "clipped_heads": clipped or [0] * count,
            "expert_load": [],
        },
        "clip_counts": [[sum(clipped or [0]), 0], [0, 0]],
    }


def training(slope: float, **changes: Any) -> Training:
    """Loss that falls by `slope` per unit of the logarithm of the step, so that the answers are known."""
    losses = [6 - slope * log(i + 1) for i in range(STEPS)]
    return training_of(NANO.model_copy(update=changes), report(losses), losses[-1])


def study(**changes: Any) -> StudyConfig:
    fields: dict[str, Any] = {
        "name": "speed",
        "title": "Speed",
        "question": "Which is faster?",
        "arms": (ArmConfig(name="slow"), ArmConfig(name="fast", fields={"lr": 0.1})),
        "reference": "slow",
        "seeds": (1, 2, 3),
        "columns": ("heldout_loss", "difference", "cost_ratio"),
        "curves": ("loss", "difference", "max_logit", "clipping"),
    }
    return StudyConfig(**fields | changes)


def trainings() -> dict[str, Training]:
    """The fast arm falls twice as fast; seeds differ more than the gain of a step."""
    found = {}
    for seed in (1, 2, 3):
        found[f"slow.{seed}"] = training(0.04 + 0.001 * seed)
        found[f"fast.{seed}"] = training(0.08 + 0.002 * seed)
    return found


def test_the_tokens_to_an_equal_loss() -> None:
    """Both lose 6 - slope ln(step): the one with twice the slope needs the square root of the steps."""
    assert cost_ratio("tokens", training(0.08), training(0.04)) == pytest.approx(STEPS**-0.5)
    assert cost_ratio("tokens", training(0.04), training(0.04)) == pytest.approx(1.0)
    assert cost_ratio("tokens", training(0.03), training(0.04)) is None


def test_differences_are_paired_by_seed() -> None:
    arm = compare(study(), trainings())["arms"][1]
    difference = arm["values"]["difference"]
    assert difference["by_seed"] == pytest.approx([-log(STEPS) * (0.04 + 0.001 * seed) for seed in (1, 2, 3)])
    assert difference["low"] < difference["mean"] < difference["high"] < 0
    assert arm["curves"]["difference"]["mean"][-1] == pytest.approx(-0.042 * log(39.5), abs=0.01)
    assert arm["values"]["difference_at_equal_cost"]["by_seed"] == pytest.approx(difference["by_seed"])


def test_the_interval_is_students() -> None:
    value = estimate([1.0, 2.0, 3.0])
    assert value["mean"] == 2.0
    assert value["high"] - value["mean"] == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)
    assert estimate([1.0, None])["mean"] is None


def test_no_peak_is_lost_and_clipping_is_counted_where_it_happened() -> None:
    logits = [1.0] * 400
    logits[333] = 500.0
    clipped = [0] * 300 + [2] * 100
    one = training_of(NANO, report([5.0] * 400, logits, clipped), 5.0)
    result = compare(study(), {f"{arm}.{seed}": one for arm in ("slow", "fast") for seed in (1, 2, 3)})["arms"][0]
    assert max(result["curves"]["max_logit"]["mean"]) == 500.0
    assert result["values"]["max_logit"]["mean"] == 500.0
    assert result["values"]["median_logit"]["mean"] == 1.0
    assert result["values"]["clipped_heads"]["mean"] == 0.25
    assert result["values"]["clipping_late"]["mean"] == result["values"]["clipping_end"]["mean"] == 0.5
    assert result["values"]["last_clip"]["mean"] == 1.0
    stopped = training_of(NANO, report([5.0] * 400, logits, clipped[200:] + [0] * 200), 5.0)
    assert (stopped.last_clip(), training(0.04).last_clip()) == (0.5, 0.0)
    assert result["curves"]["clipping"]["mean"][:3] == [0.0, 0.0, 0.0]


def test_arms_of_unequal_cost_are_compared_at_the_flops_that_all_reach() -> None:
    wide = NANO.model.model_copy(update={"num_attention_heads": 8})
    found = {f"slow.{seed}": training(0.04) for seed in (1, 2, 3)}
    found |= {f"fast.{seed}": training(0.04, model=wide) for seed in (1, 2, 3)}
    result = compare(study(axis="flops"), found)
    slow, fast = result["arms"]
    assert fast["flops_per_token"] > slow["flops_per_token"]
    assert result["grid"][-1] == pytest.approx(STEPS * BATCH * slow["flops_per_token"])
    assert fast["values"]["difference_at_equal_cost"]["mean"] > 0
    assert fast["values"]["difference"]["mean"] == 0


def test_a_loss_that_was_not_reached_is_said_so() -> None:
    found = trainings() | {"fast.2": training(0.01)}
    table = rows(compare(study(), found))
    assert table[0][3] == "tokens to the last loss of slow"
    assert table[2][3].startswith("reached by 2 of 3 seeds: ")


def test_the_sweep_is_shown_and_takes_no_part() -> None:
    sweep = SweepConfig(values={"slow": (0.01, 0.1), "fast": (0.01, 0.1)}, seeds=(9,))
    found = trainings() | {f"{arm}.{value}.9": training(0.02) for arm in ("slow", "fast") for value in ("0.01", "0.1")}
    result = compare(study(sweep=sweep, columns=("tuned", "heldout_loss")), found)
    assert sweep_rows(result)[1] == ["slow", "5.926", "5.926"]
    assert len(result["arms"][0]["values"]["heldout_loss"]["by_seed"]) == 3


def test_the_files_show_every_number_and_survive_json() -> None:
    result = compare(study(), trainings())
    assert files(json.loads(json.dumps(result, sort_keys=True))) == files(result)
    written = files(result)
    assert all(cell in written["speed.md"] and cell in written["speed.html"] for line in rows(result) for cell in line)
    figures = {name: text for name, text in written.items() if name.endswith(".svg")}
    assert all(ElementTree.fromstring(text).tag.endswith("svg") for text in figures.values())
    assert written["speed.html"].count("<svg") == len(figures)
    assert set(figures) == {
        f"speed.{figure}.svg" for figure in ("heldout", "loss", "difference", "max_logit", "clipping")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "other"}, "reference"),
        ({"arms": (ArmConfig(name="slow"), ArmConfig(name="slow"))}, "names of their own"),
        ({"sweep": SweepConfig(values={"slow": (1.0,), "fast": (2.0,)}, seeds=(1,))}, "sweep.seeds"),
        ({"sweep": SweepConfig(values={"slow": (1.0,)}, seeds=(9,))}, "sweep.values"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(**changes)
