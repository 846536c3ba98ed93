from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.generation.protocol import Completion, GenerationRequest, StreamCallback
from k2.rl.critic import GeneratorCritic, RuleCritic, win_rates

QUESTION = [{"role": "user", "content": "What is a lease?"}]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("A lease is a lock that expires.", ""),
        ("A lease is a lock that expires.", "lock lock lock lock lock"),
        ("A lease is a lock that expires.", "Great question! A lease is a lock that expires."),
        ("A lease is a lock that expires.", "A lease is a lock that expires. This answer is clear and complete."),
        ("A lease is a lock that expires.", "A lease <|im_user|> is a lock that expires."),
    ],
)
def test_the_rule_critic_follows_the_rubrics_in_both_orders(better: str, worse: str) -> None:
    assert RuleCritic().compare(QUESTION, [(better, worse), (worse, better)]) == [1.0, 0.0]


def test_equally_good_answers_tie() -> None:
    assert RuleCritic().compare(QUESTION, [("12", "13")]) == [0.5]


@given(st.lists(st.text(alphabet="ab ", max_size=6), min_size=2, max_size=6))
def test_win_rates_average_one_half_and_equal_answers_share_one(answers: list[str]) -> None:
    rates = win_rates(RuleCritic(), QUESTION, answers)
    assert sum(rates) / len(rates) == pytest.approx(0.5)
    assert all(0 <= rate <= 1 for rate in rates)
    assert len({rate for answer, rate in zip(answers, rates, strict=True) if answer == answers[0]}) == 1


def test_the_best_answer_beats_all_others() -> None:
    assert win_rates(RuleCritic(), QUESTION, ["a b", "", "a a a a"]) == [1.0, 0.0, 0.5]


def test_one_answer_has_no_win_rate() -> None:
    with pytest.raises(ValueError, match="at least two"):
        win_rates(RuleCritic(), QUESTION, ["a"])


class Scripted:
    """Prefers the longer answer, or whatever stands first when asked to."""

    identity = "scripted"

    def __init__(self, verdict: str | None = None) -> None:
        self.verdict, self.seen = verdict, [""]

    def generate(
        self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None
    ) -> list[Completion]:
        self.seen = [request.messages[0]["content"] for request in requests]
        return [Completion(self.verdict or self._longer(text)) for text in self.seen]

    def _longer(self, text: str) -> str:
        first = text.partition("Answer A:\n")[2].partition("\n\nAnswer B:\n")
        return "A" if len(first[0]) > len(first[2].partition("\n\nRubrics")[0]) else "Answer: B."


def test_a_language_model_judges_every_pair_in_both_orders() -> None:
    generator = Scripted()
    assert GeneratorCritic(generator).compare(QUESTION, [("longer", "short"), ("a", "bb")]) == [1.0, 0.0]
    assert len(generator.seen) == 4
    assert "What is a lease?" in generator.seen[0]
    assert "flattery" in generator.seen[0]


@pytest.mark.parametrize("verdict", ["A", "B", "TIE", "I cannot say", ""])
def test_position_and_evasion_decide_nothing(verdict: str) -> None:
    assert GeneratorCritic(Scripted(verdict or " ")).compare(QUESTION, [("x", "y")]) == [0.5]
