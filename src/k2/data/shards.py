"""Token shards: how a tokenized corpus is stored, so that ranks can stream parts of it and verify what they read.

    index.json                  block_bytes, dtype, and every shard: name, domain, tokens, documents, start
    <name>.npy                  the tokens of whole documents of one domain, one behind the other, from byte `start` on
    <name>.offsets.npy          where each document starts, and the end, int64 [documents + 1]
    <name>.digests.npy          SHA-256 of every `block_bytes` bytes of `<name>.npy`, uint8 [blocks, 32]

A shard is what a loader shuffles at a time. Block digests are files of the artifact themselves, verified by its
manifest, so that a range read is as safe as reading all of it.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2.data.packing import Int64, concatenate

BLOCK_BYTES = 256 * 1024
"""Bytes that are fetched and verified together: 64 to 128 thousand tokens, a few dozen documents."""
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One file of tokens. `start` is the byte where they begin."""

    name: str
    domain: str
    tokens: int
    documents: int
    start: int


def write_shards(
    documents: Iterable[tuple[str, list[int]]], vocab_size: int, folder: Path, shard_tokens: int
) -> dict[str, Any]:
    """Write (domain, tokens) in shards of at most `shard_tokens`, a longer document alone; returns the index."""
    waiting: dict[str, list[NDArray[np.uint32]]] = defaultdict(list)
    sizes, shards = defaultdict[str, int](int), list[Shard]()

    def finish(domain: str) -> None:
        name = f"{domain}-{sum(shard.domain == domain for shard in shards):05d}"
        shards.append(_write(name, domain, *concatenate(waiting.pop(domain), vocab_size), folder))
        sizes[domain] = 0

    for domain, ids in documents:
        if sizes[domain] and sizes[domain] + len(ids) > shard_tokens:
            finish(domain)
        waiting[domain].append(np.asarray(ids, dtype=np.uint32))
        sizes[domain] += len(ids)
    for domain in sorted(waiting):
        finish(domain)
    rows = [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)]
    index = {"block_bytes": BLOCK_BYTES, "dtype": str(concatenate([], vocab_size)[0].dtype), "shards": rows}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
    return index


def _write(name: str, domain: str, tokens: NDArray[Any], offsets: Int64, folder: Path) -> Shard:
    path = folder / f"{name}.npy"
    np.save(path, tokens)
    np.save(folder / f"{name}.offsets.npy", offsets)
    with path.open("rb") as file:
        digests = [hashlib.sha256(block).digest() for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
    np.save(folder / f"{name}.digests.npy", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
    return Shard(name, domain, len(tokens), len(offsets) - 1, path.stat().st_size - tokens.nbytes)


def shards_of(index: Mapping[str, Any]) -> dict[str, list[Shard]]:
    """The shards of each domain, from a parsed index."""
    found: dict[str, list[Shard]] = defaultdict(list)
    for row in index["shards"]:
        found[row["domain"]].append(Shard(**row))
    return dict(sorted(found.items()))
