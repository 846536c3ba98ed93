"""Whether a new model replaces the champion; torch-free.

The alias points at the champion's *export*, so that fetching, serving, lineage and rolling back need to know nothing
else. Scores are kept beside it under the export's content digest (`scores/<digest>.json`), written by every gate.
There is no second thing to move, and an alias that somebody moved back by hand still finds its scores.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from k2.config.base import Section, canonical_json
from k2.config.gate import GateConfig
from k2.errors import UserError
from k2.store.client import Store


class Score(Section):
    """One measured value with its 95% interval.

    n: items (or tokens) measured.
    better: the direction of improvement.
    protocol: fingerprint of how it was measured; only equal ones are compared.
    """

    value: float
    low: float
    high: float
    n: int
    better: Literal["higher", "lower"] = "higher"
    protocol: str = ""


Scores = Mapping[str, Score]
_SCORES: TypeAdapter[dict[str, Score]] = TypeAdapter(dict[str, Score])


@dataclass(frozen=True)
class Decision:
    """Whether to promote, and every check that led there."""

    promote: bool
    reasons: list[str]


def parse_scores(values: object) -> dict[str, Score]:
    """Scores from their JSON form."""
    return _SCORES.validate_python(values)


def dump_scores(scores: Scores) -> dict[str, dict[str, object]]:
    """The JSON form of scores."""
    return {name: scores[name].model_dump() for name in sorted(scores)}


def record_scores(store: Store, digest: str, scores: Scores) -> None:
    """Keep an export's scores under its content digest; a later measurement replaces an earlier one."""
    store.put(f"scores/{digest}.json", canonical_json(dump_scores(scores)).encode())


def recorded_scores(store: Store, digest: str) -> dict[str, Score]:
    """The scores recorded for an export; empty when no gate has seen it."""
    data = store.get(f"scores/{digest}.json")
    return {} if data is None else parse_scores(json.loads(data))


def improvement(candidate: Score, champion: Score) -> tuple[float, float, float]:
    """How much better the candidate is, and the 95% interval: (difference, low, high), positive is better.

    The interval of a difference from the intervals of its two terms (MOVER; Newcombe 1998, method 10, where the
    terms are proportions with Wilson intervals).
    """
    if candidate.better == "lower":
        candidate, champion = champion, candidate
    difference = candidate.value - champion.value
    below = ((candidate.value - candidate.low) ** 2 + (champion.high - champion.value) ** 2) ** 0.5
    above = ((candidate.high - candidate.value) ** 2 + (champion.value - champion.low) ** 2) ** 0.5
    return difference, difference - below, difference + above


def decide(config: GateConfig, candidate: Scores, champion: Scores | None) -> Decision:
    """Apply the configured rule; `champion` is None while there is none, and then the floors alone decide.

    Raises:
        UserError: the configuration names a score that was not measured.
    """
    for name in (config.primary, *sorted(config.max_regression), *sorted(config.floors)):
        if name not in candidate:
            raise UserError(f"gate: there is no score {name!r}; evaluate measured {', '.join(sorted(candidate))}")
    checks = [_floor(name, candidate[name], bound) for name, bound in sorted(config.floors.items())]
    if champion is None:
        checks.append((True, "there is no champion yet"))
    else:
        checks.append(_primary(config, candidate, champion))
        checks += [_regression(n, candidate[n], champion.get(n), t) for n, t in sorted(config.max_regression.items())]
    return Decision(all(passed for passed, _ in checks), [text for _, text in checks])


Check = tuple[bool, str]


def _floor(name: str, score: Score, bound: float) -> Check:
    passed = score.value >= bound if score.better == "higher" else score.value <= bound
    limit = "at least" if score.better == "higher" else "at most"
    return passed, f"{_mark(passed)}: {name} is {score.value:.4g}, {limit} {bound:.4g} is required"


def _primary(config: GateConfig, candidate: Scores, champion: Scores) -> Check:
    name = config.primary
    new, old = candidate[name], champion.get(name)
    if old is None or old.protocol != new.protocol:
        passed = config.new_protocol == "promote"
        return passed, (
            f"{_mark(passed)}: the champion's {name} was {'not measured' if old is None else 'measured differently'},"
            f" and gate.new_protocol is {config.new_protocol}"
        )
    difference, low, high = improvement(new, old)
    passed = low > config.min_improvement
    return passed, (
        f"{_mark(passed)}: {name} improves {old.value:.4g} -> {new.value:.4g} by {difference:.4g}"
        f" (95% interval {low:.4g} to {high:.4g}), more than {config.min_improvement:.4g} is required"
    )


def _regression(name: str, new: Score, old: Score | None, tolerance: float) -> Check:
    if old is None or old.protocol != new.protocol:
        return True, f"not compared: the champion's {name} was not measured the same way"
    loss = -improvement(new, old)[0]
    passed = loss <= tolerance
    return passed, (
        f"{_mark(passed)}: {name} goes {old.value:.4g} -> {new.value:.4g}, worse by at most {tolerance:.4g} is allowed"
    )


def _mark(passed: bool) -> str:
    return "passed" if passed else "failed"
