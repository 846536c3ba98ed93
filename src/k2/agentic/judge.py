"""Scores trajectories against rubrics, and measures afterwards how good those scores were.

`judge` reads what anybody could read: the transcript, the rubric and the final state. Plans, injected faults and
injected mistakes are not among its arguments; `reliability` compares verdicts with them when judging is over.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2.agentic.environment import Message
from k2.agentic.tasks import Checkpoint, Rubric, flatten
from k2.serving.tool_calls import loads_object

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.:]\d+)*(?!\w)")


@dataclass(frozen=True)
class Verdict:
    """Scores in [0, 1] by criterion, and in words what failed; a trajectory passes when nothing did."""

    scores: Mapping[str, float]
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every criterion is met."""
        return not self.reasons


@dataclass(frozen=True)
class _Event:
    """One thing the assistant did: a call with its outcome, or words to the user (`tool` is empty)."""

    tool: str
    failed: bool
    text: str


def judge(messages: Sequence[Message], rubric: Rubric, state: Mapping[str, Any]) -> Verdict:
    """Score a finished dialog whose world ended in `state`."""
    events = list(_events(messages))
    calls = [event for event in events if event.tool]
    worked = {call.tool for call in calls if not call.failed}
    said = " ".join(event.text for event in events if not event.tool)
    sources = "\n".join(str(message["content"]) for message in messages if message["role"] != "assistant")
    leaves = flatten(state)
    met = [leaves.get(path) == value for path, value in sorted(rubric.changes.items())]
    kept = [leaves.get(path) == value for path, value in sorted(rubric.keeps.items())]
    strays = set(leaves) - set(rubric.changes) - set(rubric.keeps)
    scores = {
        "finished": float(bool(events) and not events[-1].tool and bool(events[-1].text.strip())),
        "goal": _share(met),
        "collateral": _share([*kept, *(False for _ in strays)]),
        "process": _share([bool(worked & set(group)) for group in rubric.required]),
        "conduct": _share([call.tool not in rubric.forbidden for call in calls]),
        "order": _share([_in_order(events, checkpoint) for checkpoint in rubric.checkpoints]),
        "answer": _share([_states(said, answer) for answer in rubric.answers]),
        "grounding": _share([_occurs(number, sources) for number in sorted(set(_NUMBER.findall(said)))]),
        "economy": float(len(calls) <= rubric.max_calls),
    }
    return Verdict(scores, tuple(name for name, score in scores.items() if score < 1))


def confusion(verdicts: Sequence[bool], flawed: Sequence[bool]) -> list[list[int]]:
    """Trajectories by what they are (sound, flawed) and by verdict (accepted, rejected).

    One with any injected mistake counts as flawed, also when the agent recovered from it.
    """
    counts = Counter(zip(flawed, verdicts, strict=True))
    return [[counts[bad, True], counts[bad, False]] for bad in (False, True)]


def reliability(verdicts: Sequence[bool], flawed: Sequence[bool]) -> dict[str, float | None]:
    """Precision and recall of accepting, against the mistakes that were injected.

    Recovered mistakes count too, so a precision below one is not all error. None where nothing was accepted, or
    nothing was sound.
    """
    (kept, lost), (missed, _) = confusion(verdicts, flawed)
    return {
        "judge_precision": kept / (kept + missed) if kept + missed else None,
        "judge_recall": kept / (kept + lost) if kept + lost else None,
    }


def _events(messages: Sequence[Message]) -> Iterator[_Event]:
    results = {message["tool_call_id"]: message["content"] for message in messages if message["role"] == "tool"}
    for message in messages:
        if message["role"] != "assistant":
            continue
        calls = message.get("tool_calls") or ()
        if message.get("content") and not calls:
            yield _Event("", False, message["content"])
        for call in calls:
            yield _Event(call["function"]["name"], _is_error(results.get(call["id"], "")), "")


def _is_error(result: str) -> bool:
    try:
        return "error" in loads_object(result)
    except ValueError:
        return not result


def _in_order(events: Sequence[_Event], checkpoint: Checkpoint) -> bool:
    first = next((i for i, event in enumerate(events) if event.tool == checkpoint.before), len(events))
    earlier = events[:first]
    if checkpoint.event == "question":
        return any("?" in event.text for event in earlier)
    return any(event.tool in checkpoint.tools and not event.failed for event in earlier)


def _states(said: str, answer: str) -> bool:
    whole = rf"(?<![\w.-])(?<!\d:){re.escape(answer.lower())}(?![\w-]|[.:]\d)"
    return re.search(whole, said.lower()) is not None


def _occurs(number: str, sources: str) -> bool:
    """Whether the assistant was told the number: by the user, a tool, or its instructions."""
    return re.search(rf"(?<!\d){re.escape(number)}(?!\d)", sources) is not None


def _share(checks: Iterable[bool]) -> float:
    outcomes = list(checks)
    return sum(outcomes) / len(outcomes) if outcomes else 1.0
