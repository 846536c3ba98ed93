"""Which documents are worth rewriting: good prose first, every configured domain represented."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from itertools import chain, zip_longest
from typing import Any

from k2.config.rephrase import RephraseConfig

Row = Mapping[str, Any]
_WORD = re.compile(r"[A-Za-z]{2,}(?:['-][A-Za-z]+)*[.,;:!?)]*")


def choose(documents: Iterable[Row], config: RephraseConfig) -> list[Row]:
    """At most `max_documents` documents, the domains taking turns, best prose first within each."""
    ranked: dict[str, list[tuple[float, str, Row]]] = {domain: [] for domain in config.domains}
    for row in documents:
        if row["domain"] in ranked and config.min_words <= len(row["text"].split()) <= config.max_words:
            draw = hashlib.sha256(f"{config.seed}:{row['id']}".encode()).hexdigest()
            ranked[row["domain"]].append((-round(prose_share(row["text"]), 1), draw, row))
    queues = [sorted(rows, key=lambda entry: entry[:2]) for rows in ranked.values()]
    turns = chain.from_iterable(zip_longest(*queues))
    return [entry[2] for entry in turns if entry is not None][: config.max_documents]


def prose_share(text: str) -> float:
    """Share of the words that are plain words rather than symbols, code or table cells."""
    words = text.split()
    return sum(bool(_WORD.fullmatch(word)) for word in words) / max(1, len(words))
