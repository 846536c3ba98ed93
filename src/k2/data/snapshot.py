"""Collect the raw corpus: from the user's paths or from the environment, capped, with everything unread named."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from k2.config.corpus import CorpusConfig
from k2.data import environment
from k2.data.documents import Document, Problem, Record, stable_order, write_rows
from k2.data.files import find_files, read_file
from k2.errors import UserError
from k2.store.client import Store

LABELLED_CHARACTERS = 3000
SEEDS = Path(__file__).with_name("domain_seeds.json")


@dataclass
class Snapshot:
    """What was collected, and what was not and why."""

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(source["documents"] for source in self.sources.values())

    @property
    def bytes(self) -> int:
        """Size of their text in UTF-8."""
        return sum(source["bytes"] for source in self.sources.values())

    def report(self) -> dict[str, Any]:
        """The snapshot in numbers, with the first problems by name."""
        reasons = Counter(problem.reason for problem in self.problems)
        examples = [{"where": problem.where, "reason": problem.reason} for problem in self.problems[:50]]
        return {"sources": self.sources, "problems": dict(sorted(reasons.items())), "problem_examples": examples}

    def take(self, name: str, records: Iterator[Record], max_bytes: int | None) -> Iterator[Document]:
        """Pass documents on until the cap is reached, counting them under a source; problems are kept aside."""
        counts = self.sources[name]
        for record in records:
            if isinstance(record, Problem):
                self.problems.append(record)
                continue
            if max_bytes is not None and counts["bytes"] >= max_bytes:
                return
            counts["documents"] += 1
            counts["bytes"] += len(record.text.encode())
            yield record


def collect(config: CorpusConfig, store: Store, snapshot: Snapshot) -> Iterator[Document]:
    """Every document of the configured corpus. Raises UserError when a path is missing."""
    readers = _user_sources(config, store) if config.paths else _environment_sources(config)
    for name, version, records in readers:
        snapshot.sources[name] = {"documents": 0, "bytes": 0, "version": version}
        yield from snapshot.take(name, records, config.max_bytes)


def fingerprint(config: CorpusConfig, store: Store) -> str:
    """SHA-256 that changes when the text behind the configuration may have changed, without reading that text."""
    if config.paths:
        stamps = [(path, file.name, file.stamp) for path in config.paths for file in find_files(path, store)]
        return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    versions = [environment.version(source) for source in config.sources]
    return hashlib.sha256(json.dumps(versions).encode()).hexdigest()


def write_shards(documents: Iterator[Document], folder: Path, shard_bytes: int) -> None:
    """Write `00000.jsonl.zst`, ... with about `shard_bytes` of text each."""
    for shard, first in enumerate(documents):  # the rest of the shard is drawn from the same iterator
        write_rows(folder / f"{shard:05d}.jsonl.zst", _one_shard(first, documents, shard_bytes))


def labelled_examples(config: CorpusConfig) -> Iterator[dict[str, str]]:
    """Texts of known domain: short ones written for this, and the share of the environment that is set aside."""
    seeds: dict[str, list[str]] = json.loads(SEEDS.read_text(encoding="utf-8"))
    yield from ({"text": text, "domain": domain} for domain in sorted(seeds) for text in seeds[domain])
    for source, domain in environment.DOMAINS.items():
        records = environment.read(source, config, labelled=True)
        texts = (record.text[:LABELLED_CHARACTERS] for record in records if isinstance(record, Document))
        yield from ({"text": text, "domain": domain} for text in islice(texts, config.labelled_per_source))


def require_text(config: CorpusConfig, snapshot: Snapshot) -> None:
    """Raise UserError, with the first reasons, when nothing was collected."""
    if snapshot.documents == 0:
        corpus = ", ".join(config.paths) or "of the environment"
        reasons = "; ".join(f"{problem.where}: {problem.reason}" for problem in snapshot.problems[:3])
        raise UserError(f"corpus {corpus} holds no text" + (f" ({reasons})" if reasons else ""))


def _one_shard(first: Document, documents: Iterator[Document], shard_bytes: int) -> Iterator[dict[str, Any]]:
    yield first.row()
    size = len(first.text)
    while size < shard_bytes and (document := next(documents, None)) is not None:
        size += len(document.text)
        yield document.row()


def _environment_sources(config: CorpusConfig) -> Iterator[tuple[str, str, Iterator[Record]]]:
    for source in config.sources:
        yield source, environment.version(source), environment.read(source, config, labelled=False)


def _user_sources(config: CorpusConfig, store: Store) -> Iterator[tuple[str, str, Iterator[Record]]]:
    for path in config.paths:
        files = {file.name: file for file in find_files(path, store)}
        # a cap takes files in a seeded order; without one the order of names is kept
        names = sorted(files) if config.max_bytes is None else stable_order(files, config.seed)
        yield path, f"{len(files)} files", (record for name in names for record in read_file(files[name], path))
