"""Near-duplicate clusters by datatrove's MinHash, over normalised documents on local disk."""

import contextlib
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from numpy.typing import NDArray

from k2.config.ingest import MinHashConfig
from k2.data.cleaning import normalize_documents


class SpaceSeparatedWords(WhitespaceTokenizer):  # type: ignore[misc]  # datatrove has no types
    """Words as the published filters count them: what whitespace separates. Needs no language model."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split()


WORDS = SpaceSeparatedWords()
_BLOCK = 4096


class BlockwiseSignature(MinhashDedupSignature):  # type: ignore[misc]
    """The same signatures in bounded memory: datatrove's takes about 2 kB for each word of the longest document."""

    def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
        """The minimum over blocks of shingles is the minimum over all; buckets as lists of hashes."""
        blocks = [super(BlockwiseSignature, self).get_signature(b) for b in np.split(shingles, _cuts(len(shingles)))]
        signature: list[list[int]] = np.min(np.asarray(blocks, dtype=np.uint64), axis=0).tolist()
        return signature


def _cuts(length: int) -> range:
    return range(_BLOCK, length, _BLOCK)


def normalize_and_cluster(
    raw: Path, scratch: Path, config: MinHashConfig, seed: int, workers: int
) -> list[tuple[Path, dict[int, int]]]:
    """Normalise the shards in `raw` and find near-duplicates among all of them.

    Returns, per shard, the normalised JSON-lines file and the cluster number of each document in it that
    has near-duplicates anywhere.
    """
    shards = len(list(raw.iterdir()))
    minhash = MinhashConfig(
        n_grams=config.ngram,
        num_buckets=config.buckets,
        hashes_per_bucket=config.hashes_per_bucket,
        seed=seed,
        # numbers count: two computations that differ in nothing else are two documents
        norm_config=TextNormConfig(norm_numbers=False),
        hash_config=HashConfig(hash_fc="sha1"),
    )
    clean, signatures, pairs, clusters = (str(scratch / name) for name in ("clean", "signatures", "pairs", "clusters"))
    read_and_sign = [
        JsonlReader(str(raw), adapter=_adapt),
        normalize_documents,
        JsonlWriter(clean, output_filename="${rank}.jsonl", compression=None, adapter=_flatten),
        BlockwiseSignature(signatures, minhash, language=WORDS),
    ]
    _execute(read_and_sign, scratch / "logs-sign", tasks=shards, workers=min(workers, shards))
    _execute([MinhashDedupBuckets(signatures, pairs, config=minhash)], scratch / "logs-pairs", config.buckets, 1)
    _execute([MinhashDedupCluster(pairs, clusters, minhash, save_cluster_id=True)], scratch / "logs-cluster", 1, 1)
    return [
        (scratch / "clean" / f"{rank:05d}.jsonl", dict(_cluster_pairs(scratch / "clusters" / f"{rank:06d}.clusters")))
        for rank in range(shards)
    ]


def _adapt(reader: JsonlReader, row: dict[str, Any], path: str, number: int) -> dict[str, Any]:
    """A snapshot row as datatrove wants it; source and meta travel as metadata."""
    return {"id": row["id"], "text": row["text"], "metadata": {"source": row["source"], **row["meta"]}}


def _flatten(writer: JsonlWriter, document: Document) -> dict[str, Any]:
    """datatrove's own form leaves out what is empty, an empty text too."""
    return {"id": document.id, "text": document.text, "source": document.metadata["source"]}


def _execute(pipeline: Sequence[Callable[..., Any]], logs: Path, tasks: int, workers: int) -> None:
    """Run steps with datatrove's local executor; its logs go nowhere."""
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        LocalPipelineExecutor(list(pipeline), tasks=tasks, workers=workers, logging_dir=str(logs)).run()


def _cluster_pairs(path: Path) -> Iterator[tuple[int, int]]:
    if path.exists():
        yield from struct.iter_unpack("<2I", path.read_bytes())
