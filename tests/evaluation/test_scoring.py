import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from k2.evaluation.scoring import bootstrap, paired_bootstrap, wilson


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_equals_scipy(n: int, share: float) -> None:
    successes = round(share * n)
    reference = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_nothing_measured_is_total_ignorance() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 900)
    low, high = bootstrap(values.tolist(), seed=1)
    half = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap(values.tolist(), seed=1) == (low, high)


def test_pairing_removes_what_items_share() -> None:
    random = np.random.default_rng(5)
    difficulty = random.normal(0, 10, 400)
    first, second = difficulty + random.normal(0, 0.1, 400), difficulty + random.normal(0.1, 0.1, 400)
    mean, low, high = paired_bootstrap(first.tolist(), second.tolist())
    assert 0 < low < mean < high < 0.15
    assert bootstrap(second.tolist())[0] < np.mean(first)  # unpaired, the difference drowns


def test_unequal_or_empty_input_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in number"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])
