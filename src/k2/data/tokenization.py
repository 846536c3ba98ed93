"""A corpus to a trained tokenizer and token arrays."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from k2.config.tokenize import TokenizeConfig
from k2.data.documents import read_rows
from k2.data.packing import concatenate
from k2.data.shards import shards_of, write_shards
from k2.data.tokenizer import Tokenizer

_BATCH = 512


def train_tokenizer(documents: Path, config: TokenizeConfig) -> Tokenizer:
    """Train on a seeded choice of the documents, about `train_bytes` of them, and on the chat texts."""
    size = sum(len(row["text"].encode()) for row in read_rows(documents))
    share = config.train_bytes / max(size, 1)
    chosen = (row["text"] for row in read_rows(documents) if _draw(row["id"], config.seed) < share)
    return Tokenizer.train(
        chain(chosen, config.chat_texts * config.chat_repeats),
        config.vocab_size,
        digits_per_token=config.digits_per_token,
        special_slots=config.special_slots,
    )


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) for a document, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def write_tokens(documents: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Write `tokens.npy` and `offsets.npy`, each document followed by [EOS]; return their sizes."""
    counts: Counter[str] = Counter()
    encoded = (ids for _, ids in _encoded(documents, tokenizer, counts))
    tokens, offsets = concatenate(encoded, tokenizer.vocab_size)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "offsets.npy", offsets)
    return dict(counts)


def write_training_tokens(documents: Path, tokenizer: Tokenizer, folder: Path, shard_tokens: int) -> dict[str, Any]:
    """Write shards by domain, each document followed by [EOS]; return their sizes, and the tokens of each domain."""
    counts: Counter[str] = Counter()
    index = write_shards(_encoded(documents, tokenizer, counts), tokenizer.vocab_size, folder, shard_tokens)
    domains = {name: sum(shard.tokens for shard in shards) for name, shards in shards_of(index).items()}
    return {**counts, "shards": len(index["shards"]), "domains": domains}


def _encoded(documents: Path, tokenizer: Tokenizer, counts: Counter[str]) -> Iterator[tuple[str, list[int]]]:
    """Domain and tokens of every document, which are counted on the way."""
    counts.update(documents=0, bytes=0, tokens=0)
    rows = read_rows(documents)
    while batch := list(islice(rows, _BATCH)):
        texts = [row["text"] for row in batch]
        for row, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
            counts.update(documents=1, bytes=len(row["text"].encode()), tokens=len(ids) + 1)
            yield row["domain"], [*ids, tokenizer.special["[EOS]"]]


def token_examples(tokenizer: Tokenizer, documents: Path, count: int = 3) -> list[list[str]]:
    """The first tokens of some documents, spelled out, for the report."""
    texts: Iterator[Any] = (row["text"][:200] for row in read_rows(documents))
    return [[tokenizer.decode([token]) for token in tokenizer.encode(text)[:40]] for text in islice(texts, count)]
