"""From raw shards to unique, clean documents with a domain, and a held-out set that training never meets."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from k2.config.ingest import IngestConfig
from k2.data.domains import DomainClassifier
from k2.data.heldout import HeldoutGuard, content_digest, score
from k2.data.quality import QualityFilter

Row = dict[str, Any]
Shard = tuple[Path, dict[int, int]]
_BATCH = 256
_EXAMPLE_CHARACTERS = 200


@dataclass
class Tally:
    """What became of the documents."""

    documents: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    heldout: Counter[str] = field(default_factory=Counter)
    dropped: list[Row] = field(default_factory=list)
    examples: dict[str, Row] = field(default_factory=dict)

    def drop(self, row: Row, reason: str) -> None:
        """Note a dropped document, and show the first of each reason."""
        self.dropped.append({"id": row["id"], "reason": reason})
        self.examples.setdefault(reason, {"id": row["id"], "text": row["text"][:_EXAMPLE_CHARACTERS]})

    def reasons(self) -> dict[str, int]:
        """Number of dropped documents by reason, sorted."""
        return dict(sorted(Counter(row["reason"] for row in self.dropped).items()))


class Ingestion:
    """The passes over the normalised shards. First the split is decided; only then is anything else computed."""

    def __init__(self, shards: list[Shard], labelled: Iterable[Row], config: IngestConfig) -> None:
        self._shards, self._seed = shards, config.seed
        self.tally = Tally()
        scores = (score(digest, self._seed) for _, digest, reason in self._unique() if reason is None)
        # a corpus too small for the fraction still gives one held-out document
        self._threshold = max(int(config.heldout_fraction * 2**64), min(scores, default=0) + 1)
        self._heldout = [row for row, digest, reason in self._unique() if reason is None and self._is_heldout(digest)]
        self._guard = HeldoutGuard(row["text"] for row in self._heldout)
        known = [row for row in labelled if not self._guard.repeats(row["text"])]
        texts, domains = [row["text"] for row in known], [row["domain"] for row in known]
        self.classifier = DomainClassifier(texts, domains, config.seed, config.test_fraction)
        self._quality = QualityFilter(config.quality)

    def heldout(self) -> Iterator[Row]:
        """The clean held-out documents."""
        return self._judged(self._heldout, self.tally.heldout)

    def training(self) -> Iterator[Row]:
        """The clean training documents."""
        return self._judged(self._candidates(), self.tally.kept)

    def _unique(self) -> Iterator[tuple[Row, bytes, str | None]]:
        """Every document with its content digest, and the reason when it is empty or a duplicate."""
        seen: set[bytes] = set()
        seen_clusters: set[int] = set()
        for path, clusters in self._shards:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file):
                    row = json.loads(line)
                    digest, cluster = content_digest(row["text"]), clusters.get(number)
                    if not row["text"]:
                        yield row, digest, "empty"
                    elif digest in seen:
                        yield row, digest, "exact_duplicate"
                    elif cluster in seen_clusters:
                        yield row, digest, "near_duplicate"
                    else:
                        yield row, digest, None
                    seen.add(digest)
                    seen_clusters.update(() if cluster is None else (cluster,))

    def _is_heldout(self, digest: bytes) -> bool:
        return score(digest, self._seed) < self._threshold

    def _candidates(self) -> Iterator[Row]:
        for row, digest, reason in self._unique():
            self.tally.documents += 1
            if reason is not None:
                self.tally.drop(row, reason)
            elif self._is_heldout(digest):
                continue
            elif self._guard.repeats(row["text"]):
                self.tally.drop(row, "repeats_heldout")
            else:
                yield row

    def _judged(self, rows: Iterable[Row], kept: Counter[str]) -> Iterator[Row]:
        """The rows that pass the quality filter of their predicted domain."""
        for batch in _batches(rows):
            for row, domain in zip(batch, self.classifier.predict([row["text"] for row in batch]), strict=True):
                reason = self._quality.reason(row["text"], domain)
                if reason is not None:
                    self.tally.drop(row, reason)
                    continue
                kept[domain] += 1
                yield {**row, "domain": domain}


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
