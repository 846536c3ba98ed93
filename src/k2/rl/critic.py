"""Pairwise judgement of answers against rubrics, and win rates as rewards (report 3.2.2 and appendix F; torch-free).

How pairwise outcomes become a scalar is undisclosed; here it is the win rate within the group, a tie counting half.
"""

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from k2.generation.protocol import GenerationRequest, Generator, Message
from k2.serving.chat_template import content_text

CORE_RUBRICS = (
    "Clarity and relevance: answers what was asked, briefly, with nothing beside the point.",
    "Conversational fluency: complete, natural, without repetition.",
    "Objective and grounded: no commentary on the answer itself, no flattery of the user.",
)
"""The core rubrics of appendix F.1, in short."""

PRESCRIPTIVE_RUBRICS = (
    "Does not open with praise of the user or the question.",
    "Does not explain why the answer is good.",
)
"""Appendix F.2: against reward hacking."""

_PRAISE = re.compile(r"\s*(great|good|excellent|what an?|nice|interesting) (question|point|request|idea)", re.I)
_SELF = re.compile(r"\b(this|my|the above) (answer|response|reply) (is|was|fully|clearly|directly)\b", re.I)
_MARKUP = re.compile(r"<\|\w+\|>|\[(BOS|EOS|EOT|PAD|UNK)\]")


class Critic(Protocol):
    """Who judges pairs."""

    def compare(self, messages: Sequence[Message], pairs: Sequence[tuple[str, str]]) -> list[float]:
        """For each pair of answers to `messages`: 1 when the first is better, 0 when the second, 0.5 for a tie."""


class RuleCritic:
    """The offline critic: the part of the rubrics that plain text shows, one vote per rubric.

    It cannot tell a true answer from a false one; verifiable rewards do that.
    """

    rubrics: tuple[Callable[[str], float], ...]

    def __init__(self) -> None:
        self.rubrics = (_says_something, _without_repetition, _without_markup, _without_praise, _without_self_praise)

    def compare(self, messages: Sequence[Message], pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Majority of the rubrics' votes."""
        return [_outcome(sum(_sign(rubric(a) - rubric(b)) for rubric in self.rubrics)) for a, b in pairs]


class GeneratorCritic:
    """A language model as the critic. Every pair is judged in both orders, so that position decides nothing."""

    def __init__(self, generator: Generator, rubrics: Sequence[str] = CORE_RUBRICS + PRESCRIPTIVE_RUBRICS) -> None:
        self._generator, self._rubrics = generator, rubrics

    def compare(self, messages: Sequence[Message], pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Mean over both orders; a verdict that names neither answer counts as a tie."""
        ordered = [order for a, b in pairs for order in ((a, b), (b, a))]
        requests = [self._request(messages, first, second) for first, second in ordered]
        verdicts = [_verdict(completion.text) for completion in self._generator.generate(requests)]
        return [(straight + 1 - swapped) / 2 for straight, swapped in zip(verdicts[::2], verdicts[1::2], strict=True)]

    def _request(self, messages: Sequence[Message], first: str, second: str) -> GenerationRequest:
        dialog = "\n".join(f"{message['role']}: {content_text(message.get('content'))}" for message in messages)
        rubrics = "\n".join(f"- {rubric}" for rubric in self._rubrics)
        text = (
            f"Conversation:\n{dialog}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nRubrics:\n{rubrics}\n\n"
            "Which answer meets the rubrics better? Reply with A, B or TIE and nothing else."
        )
        return GenerationRequest(messages=[{"role": "user", "content": text}], max_tokens=4)


def win_rates(critic: Critic, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
    """Share of the other answers that each answer beats; equal answers tie without being judged.

    Raises:
        ValueError: fewer than two answers.
    """
    if len(answers) < 2:
        raise ValueError("a win rate needs at least two answers")
    distinct = sorted(set(answers))
    pairs = [(a, b) for i, a in enumerate(distinct) for b in distinct[i + 1 :]]
    outcomes = dict(zip(pairs, critic.compare(messages, pairs), strict=True))
    scores = outcomes | {(b, a): 1 - score for (a, b), score in outcomes.items()}
    total = [sum(scores.get((answer, other), 0.5) for other in answers) - 0.5 for answer in answers]
    return [value / (len(answers) - 1) for value in total]


def _verdict(text: str) -> float:
    found = re.search(r"\b(A|B|TIE)\b", text.upper())
    return {"A": 1.0, "B": 0.0}.get(found[1], 0.5) if found else 0.5


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _outcome(votes: int) -> float:
    return (_sign(votes) + 1) / 2


def _says_something(text: str) -> float:
    return float(bool(text.strip()))


def _without_repetition(text: str) -> float:
    words = text.split()
    return len(set(words)) / len(words) if words else 0.0


def _without_markup(text: str) -> float:
    return -float(len(_MARKUP.findall(text)))


def _without_praise(text: str) -> float:
    return float(_PRAISE.match(text) is None)


def _without_self_praise(text: str) -> float:
    return float(_SELF.search(text) is None)
