"""Does a rewrite still say what its source said? Embedding similarity plus a check of numbers and names.

K2 verifies the semantic alignment of every rewritten passage with its source (report section 2.2) without naming
the metric.
"""

import re
from dataclasses import dataclass

from k2.config.rephrase import FidelityConfig

NGRAM = 5
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])")
# "One" is a pronoun more often than a number.
_COUNTED = "two three four five six seven eight nine ten eleven twelve"
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_COUNTED.split(), start=2)}
# Identifiers: dotted, with an underscore, in camel case, called with (), or set in quotes or backticks.
_IDENTIFIER = re.compile(r"\b\w+(?:[._]\w+)+\b|\b[a-z]+[A-Z]\w*\b|\b\w+(?=\(\))|(?<=[`'\"])\w+(?=[`'\"])")
_NAME = re.compile(r"(?<![.!?:\n*-]\s)(?<![.!?:\n]\s\s)(?<!^)(?<!\n)\b[A-Z]\w*[a-zA-Z]\w*\b")
_WORD = re.compile(r"\w+")
# What a model says about its answer instead of giving it, or repeats of the prompt.
_LEAK = re.compile(
    r"^\W*(here(?:'s| is| are)|sure\b|certainly\b|of course\b|okay\b|as an ai|i'm sorry|i can(?:'t|not))"
    r"|\b((?:original|rewritten) (?:text|passage|version|message)"
    r"|the (?:passage|text|paragraph) (?:above|below|you)|rewrite (?:the|this))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """What the checks found for one rewrite; it is accepted when there is no reason against it."""

    similarity: float
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        return not self.reasons


def verify(
    source: str, rewrite: str, similarity: float, config: FidelityConfig, *, context: str = "", written: str = ""
) -> Verdict:
    """Judge one rewrite of `source`.

    Numbers and names may also come from `context`, the source that preceded it; what was `written` for that part
    of the document must not be said again.
    """
    ratio = len(rewrite.split()) / max(1, len(source.split()))
    known = f"{context}\n{source}"
    checks = {
        "similarity": similarity < config.min_similarity,
        "number_vanished": _lost(numbers(source), numbers(rewrite)) > config.max_missing_numbers,
        "number_appeared": _lost(numbers(rewrite), numbers(known)) > config.max_added_numbers,
        "name_vanished": _absent(names(source), rewrite) > config.max_missing_names,
        "name_appeared": _absent(names(rewrite), known) > config.max_added_names,
        "too_short": ratio < config.min_length_ratio,
        "too_long": ratio > config.max_length_ratio,
        "copied": copied_share(source, rewrite) > config.max_copied,
        "repeats": max(repeated_share(rewrite), copied_share(written, rewrite)) > config.max_repeated,
        "leak": bool(_LEAK.search(rewrite)) and not _LEAK.search(source),
    }
    return Verdict(similarity, tuple(name for name, failed in checks.items() if failed))


def numbers(text: str) -> set[str]:
    """Numbers in digits, and the number words from two to twelve, as digits without grouping commas."""
    spelled = {_NUMBER_WORDS[word] for word in _WORD.findall(text.lower()) if word in _NUMBER_WORDS}
    return spelled | {re.sub(r",(?=\d{3}\b)", "", number) for number in _NUMBER.findall(text)}


def names(text: str) -> set[str]:
    """Identifiers, quoted names, and capitalised words that do not merely open a sentence."""
    return {match for pattern in (_IDENTIFIER, _NAME) for match in pattern.findall(text)}


def copied_share(source: str, rewrite: str) -> float:
    """Share of the rewrite's word 5-grams that stand in the source verbatim."""
    grams, known = _grams(rewrite), set(_grams(source))
    return sum(gram in known for gram in grams) / max(1, len(grams))


def repeated_share(text: str) -> float:
    """Share of the word 5-grams of `text` that occurred in it before: the loops small models fall into."""
    grams = _grams(text)
    return 1 - len(set(grams)) / max(1, len(grams)) if grams else 0.0


def _grams(text: str) -> list[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return [tuple(words[n : n + NGRAM]) for n in range(len(words) - NGRAM + 1)]


def _lost(wanted: set[str], present: set[str]) -> float:
    return len(wanted - present) / max(1, len(wanted))


def _absent(terms: set[str], text: str) -> float:
    """Share of `terms` that `text` does not contain as whole words, whatever their case."""
    words = set(re.findall(r"[\w.]*\w", text.lower())) | set(_WORD.findall(text.lower()))
    return len([term for term in terms if term.lower() not in words]) / max(1, len(terms))
