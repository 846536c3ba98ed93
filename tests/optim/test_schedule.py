"""Learning rates as published, and as a pure function of tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.optim.schedule import Phase, Schedule, warmup_cosine

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
