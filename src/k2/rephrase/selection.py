"""Which documents are worth rewriting, and which part of them: good prose first, every configured domain present."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from itertools import chain, zip_longest
from typing import Any

from k2.config.rephrase import RephraseConfig
from k2.rephrase.fidelity import names, numbers

Row = Mapping[str, Any]
MIN_PLAIN = 0.85  # share of plain words in a paragraph of prose
MAX_TERMS = 0.1  # names and numbers per word in it
MIN_PARAGRAPH_WORDS = 6
_PARAGRAPH = re.compile(r"\n\s*\n")
_WORD = re.compile(r"[A-Za-z]{2,}(?:['-][A-Za-z]+)*[.,;:!?)]*|[aAI]")
_SENTENCE_END = re.compile(r"[.!?][\"')]?\s*\Z")
# Doctests, field lists, section underlines, list items, indented blocks, definitions, literals, formulas, lead-ins.
_MARKUP = re.compile(
    r">>>|^\s*[:.]{1,2}\s?\w|-{3,}|={3,}|^\s*[-*|+] |^\s+\S|^\s*\w+\s*(?::|--|-)\s|``|::|[{}<>=\\|]|:\s*$", re.MULTILINE
)


def choose(documents: Iterable[Row], config: RephraseConfig) -> list[Row]:
    """At most `max_documents` documents, the domains taking turns, best prose first within each.

    Each row gets a `passage`: what is to be rewritten, the whole text or (`prose_only`) its paragraphs of prose.
    """
    ranked: dict[str, list[tuple[float, str, Row]]] = {domain: [] for domain in config.domains}
    for row in documents:
        if row["domain"] not in ranked:
            continue
        passage = prose(row["text"]) if config.prose_only else row["text"]
        if config.min_words <= len(passage.split()) <= config.max_words:
            draw = hashlib.sha256(f"{config.seed}:{row['id']}".encode()).hexdigest()
            rank = term_share(passage) - plain_share(passage)
            ranked[row["domain"]].append((round(rank, 1), draw, {**row, "passage": passage}))
    turns = chain.from_iterable(zip_longest(*map(_distinct, ranked.values())))
    return [row for row in turns if row is not None][: config.max_documents]


def prose(text: str) -> str:
    """The paragraphs of `text` that are plain sentences, a line each; tables, code and parameter lists are left out."""
    return "\n\n".join(" ".join(part.split()) for part in _PARAGRAPH.split(text) if _is_prose(part))


def plain_share(text: str) -> float:
    """Share of the words that are plain words rather than symbols, code or table cells."""
    words = text.split()
    return sum(bool(_WORD.fullmatch(word)) for word in words) / max(1, len(words))


def term_share(text: str) -> float:
    """Names and numbers per word: what a rewrite must repeat literally."""
    return (len(names(text)) + len(numbers(text))) / max(1, len(text.split()))


def _distinct(entries: Iterable[tuple[float, str, Row]]) -> list[Row]:
    """Best first, and of equal passages (overloads share their prose) only the first."""
    rows: dict[str, Row] = {}
    for _, _, row in sorted(entries, key=lambda entry: entry[:2]):
        rows.setdefault(row["passage"], row)
    return list(rows.values())


def _is_prose(paragraph: str) -> bool:
    if len(paragraph.split()) < MIN_PARAGRAPH_WORDS or _MARKUP.search(paragraph):
        return False
    ends = _SENTENCE_END.search(paragraph) is not None
    return ends and plain_share(paragraph) >= MIN_PLAIN and term_share(paragraph) <= MAX_TERMS
