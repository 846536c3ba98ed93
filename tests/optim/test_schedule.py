"""Learning rates as published, and as a pure function of tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.config.load import load_config
from k2.optim.schedule import Phase, Schedule, warmup_cosine
from k2.training.pretraining import schedule_of

B = 10**9
KIMI = Schedule(
    [
        Phase("warmup", 34 * B, 2e-4, "linear", 4096),
        Phase("stable", 9966 * B, 2e-4, "constant", 4096),
        Phase("decay", 5500 * B, 2e-5, "cosine", 4096),
        Phase("annealing", 400 * B, 2e-5 - 13e-6 * 400 / 460, "linear", 4096),
        Phase("long-context", 60 * B, 7e-6, "linear", 32768, yarn=True),
    ]
)


def test_kimi_k2_phases() -> None:
    assert KIMI.lr(17 * B) == pytest.approx(1e-4)
    assert KIMI.lr(5000 * B) == 2e-4
    assert KIMI.lr(12750 * B) == pytest.approx((2e-4 + 2e-5) / 2)
    assert KIMI.lr(15500 * B) == pytest.approx(2e-5)
    assert KIMI.lr(15730 * B) == pytest.approx(2e-5 - 6.5e-6)
    assert KIMI.lr(15960 * B) == pytest.approx(7e-6)
    assert KIMI.tokens == 15960 * B
    assert [KIMI.phase(t * B).name for t in (0, 34, 10000, 15899, 15900, 99999)] == [
        "warmup",
        "stable",
        "decay",
        "annealing",
        "long-context",
        "long-context",
    ]


@given(st.integers(1, 15960))
def test_rates_are_continuous_and_bounded(billions: int) -> None:
    here, next_ = KIMI.lr(billions * B), KIMI.lr(billions * B + 1)
    assert 0 < here <= 2e-4
    assert math.isclose(here, next_, rel_tol=1e-6)


def test_empty_phases_vanish_and_the_end_holds() -> None:
    schedule = Schedule([Phase("warmup", 0, 1.0, "linear"), Phase("decay", 10, 0.1, "linear")])
    assert [phase.name for phase in schedule.phases] == ["decay"]
    assert schedule.lr(1000) == 0.1


def test_warmup_cosine() -> None:
    schedule = warmup_cosine(1.0, 10, 110, 0.1)
    assert [schedule.lr(t) for t in (5, 10, 110)] == pytest.approx([0.5, 1.0, 0.1])
    assert schedule.lr(60) == pytest.approx(0.55)


PRESETS = ("nano", "tiny", "small", "moonlight-16b", "k2-1t")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_phases_of_every_preset(preset: str) -> None:
    config = load_config(preset, {}).pretrain
    schedule = schedule_of(config)
    lengths = {
        "warmup": config.warmup_tokens,
        "stable": config.stable_tokens,
        "decay": config.decay_tokens,
        "annealing": config.annealing_tokens,
        "long_context": config.long_context_tokens,
    }
    assert {phase.name: phase.tokens for phase in schedule.phases} == {n: t for n, t in lengths.items() if t}
    assert schedule.tokens == config.total_tokens
    long = {phase.name for phase in schedule.phases if phase.yarn}
    assert long == {"long_context"} & {phase.name for phase in schedule.phases}
    assert all(
        phase.context_length == (config.long_context_length if phase.yarn else config.context_length)
        for phase in schedule.phases
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rate_of_every_preset_is_continuous_and_depends_on_tokens_alone(preset: str) -> None:
    config = load_config(preset, {}).pretrain
    schedule, step = schedule_of(config), config.batch_tokens
    points = sorted({*range(step, config.total_tokens, max(step, config.total_tokens // 5000)), config.total_tokens})
    rates = [schedule.lr(tokens) for tokens in points]
    for phase, end in zip(schedule.phases, (schedule.end(i) for i in range(len(schedule.phases))), strict=True):
        assert math.isclose(schedule.lr(end), phase.lr_end, rel_tol=1e-9)
        assert abs(schedule.lr(end + 1) - schedule.lr(end)) <= config.lr / min(p.tokens for p in schedule.phases)
    warm = [rate for tokens, rate in zip(points, rates, strict=True) if tokens <= config.warmup_tokens]
    assert warm == sorted(warm)
    falling = rates[len(warm) :]
    assert falling == sorted(falling, reverse=True)
    assert max(rates) <= config.lr * (1 + 1e-12)
    # A resumed run builds its schedule anew and asks in whatever order.
    assert [schedule_of(config).lr(tokens) for tokens in reversed(points)] == rates[::-1]


def test_kimi_k2s_preset_is_the_published_recipe() -> None:
    config = load_config("k2-1t", {}).pretrain
    schedule = schedule_of(config)
    ends = {phase.name: (schedule.end(i), phase) for i, phase in enumerate(schedule.phases)}
    assert config.batch_tokens == 16384 * 4096
    assert config.warmup_tokens == 500 * config.batch_tokens
    assert ends["stable"][0] == 10_000 * B
    assert ends["decay"][0] == 15_500 * B
    assert ends["annealing"][0] == 15_900 * B
    assert ends["long_context"][0] == 15_960 * B
    assert [schedule.lr(t * B) for t in (5_000, 10_000, 15_500)] == pytest.approx([2e-4, 2e-4, 2e-5])
    assert schedule.lr(15_960 * B) == pytest.approx(7e-6)
    assert [ends[n][1].context_length for n in ("annealing", "long_context")] == [4096, 32768]
