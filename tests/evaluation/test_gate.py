"""The promotion rule: intervals, floors, regressions, directions, and what cannot be compared."""

import pytest

from k2.config.gate import GateConfig
from k2.errors import UserError
from k2.evaluation.gate import (
    Score,
    decide,
    dump_scores,
    improvement,
    parse_scores,
    record_scores,
    recorded_scores,
)
from k2.evaluation.scoring import wilson


def accuracy(successes: int, n: int = 1000, protocol: str = "p") -> Score:
    low, high = wilson(successes, n)
    return Score(value=successes / n, low=low, high=high, n=n, protocol=protocol)


def perplexity(value: float) -> Score:
    return Score(value=value, low=value - 0.1, high=value + 0.1, n=1000, better="lower", protocol="p")


RULE = GateConfig(
    primary="sum/greedy",
    min_improvement=0.0,
    max_regression={"heldout/perplexity": 0.2, "tool/greedy": 0.02},
    floors={"sum/greedy": 0.1, "heldout/perplexity": 50.0},
)


def scores(total: int = 500, tool: int = 600, ppl: float = 10.0) -> dict[str, Score]:
    return {"sum/greedy": accuracy(total), "tool/greedy": accuracy(tool), "heldout/perplexity": perplexity(ppl)}


def test_difference_interval_matches_newcombe_method_ten():
    # Newcombe (1998), example (a): 56/70 against 48/80, score interval 0.0524 to 0.3339.
    difference, low, high = improvement(accuracy(56, 70), accuracy(48, 80))
    assert difference == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_lower_is_better_turns_the_sign():
    difference, low, high = improvement(perplexity(9.0), perplexity(10.0))
    assert low < difference < high
    assert difference == pytest.approx(1.0)


@pytest.mark.parametrize(("total", "promote"), [(499, False), (510, False), (600, True), (400, False)])
def test_improvement_must_be_more_than_chance(total, promote):
    assert decide(RULE, scores(total), scores(500)).promote is promote


def test_minimum_improvement_counts_from_the_interval():
    rule = RULE.model_copy(update={"min_improvement": 0.08})
    assert not decide(rule, scores(600), scores(500)).promote
    assert decide(rule, scores(650), scores(500)).promote


@pytest.mark.parametrize(
    ("change", "promote"),
    [({"tool": 585}, True), ({"tool": 570}, False), ({"ppl": 10.15}, True), ({"ppl": 10.3}, False), ({"ppl": 5}, True)],
)
def test_regressions_block_beyond_their_tolerance(change, promote):
    assert decide(RULE, scores(700, **change), scores(500)).promote is promote


def test_the_first_model_needs_the_floors_only():
    assert decide(RULE, scores(100), None).promote
    assert not decide(RULE, scores(99), None).promote
    assert not decide(RULE, scores(ppl=50.1), None).promote


def test_floors_hold_against_a_champion_too():
    decision = decide(RULE, scores(700, ppl=51), scores(500, ppl=51))
    assert not decision.promote
    assert any(reason.startswith("failed: heldout/perplexity is 51") for reason in decision.reasons)


def test_another_protocol_is_not_compared():
    champion = scores(100) | {"sum/greedy": accuracy(100, protocol="other")}
    decision = decide(RULE, scores(900), champion)
    assert not decision.promote
    assert any("measured differently" in reason for reason in decision.reasons)
    assert not decide(RULE, scores(900), {}).promote
    new_line = RULE.model_copy(update={"new_protocol": "promote"})
    assert decide(new_line, scores(300), champion).promote
    assert not decide(new_line, scores(300), scores(500)).promote


def test_an_unknown_score_names_what_there_is():
    with pytest.raises(UserError, match=r"no score 'x'.*sum/greedy"):
        decide(GateConfig(primary="x"), scores(), None)


def test_scores_survive_json_and_the_store(store):
    assert parse_scores(dump_scores(scores())) == scores()
    assert recorded_scores(store, "d" * 64) == {}
    record_scores(store, "d" * 64, scores(1))
    record_scores(store, "d" * 64, scores(2))
    assert recorded_scores(store, "d" * 64) == scores(2)
