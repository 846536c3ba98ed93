"""Shards on a real store: what is asked for is read and verified, and a store that is away is waited for."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2.data import shards
from k2.data.loader import TokenLoader
from k2.data.prefetch import Prefetch
from k2.data.shards import INDEX, shards_of, write_shards
from k2.data.streaming import ArtifactFiles, ShardedCorpus, stream
from k2.errors import StageError
from k2.store.artifacts import Artifact, CorruptArtifactError
from k2.store.client import Store, StoreError

Make = Callable[..., Artifact]
DOCUMENTS = [[100 * number + i for i in range(50 + 7 * number)] for number in range(60)]


@pytest.fixture
def artifact(make_artifact: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Sixty documents of one domain in three shards of small blocks."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1024)
    write_shards((("web", ids) for ids in DOCUMENTS), 1 << 16, tmp_path, 6000)
    return make_artifact(
        "tokenize", {f"train/{path.name}": path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    )


class Counting(ArtifactFiles):
    """Notes what is read."""

    def __init__(self, artifact: Artifact, patience_s: float = 0.0) -> None:
        super().__init__(artifact, "train", patience_s)
        self.ranges: list[tuple[str, int, int]] = []

    def read_range(self, name: str, start: int, length: int) -> bytes:
        self.ranges.append((name, start, length))
        return super().read_range(name, start, length)


def opened(artifact: Artifact, limit: int = 1 << 20) -> tuple[ShardedCorpus, Counting]:
    files = Counting(artifact)
    return stream(json.loads(files.read(INDEX)), files, limit)["web"], files


def test_the_stream_is_the_documents(artifact: Artifact) -> None:
    corpus, files = opened(artifact)
    assert corpus.windows == 3
    assert corpus.documents == len(DOCUMENTS)
    index = np.arange(corpus.tokens).reshape(-1, 10)[::-1]
    assert corpus.read(index)[::-1].flatten().tolist() == [token for ids in DOCUMENTS for token in ids]
    ends = [i == len(ids) - 1 for ids in DOCUMENTS for i in range(len(ids))]
    assert corpus.is_last(index)[::-1].flatten().tolist() == ends
    bounds = np.concatenate([corpus.offsets(window)[:-1] for window in range(3)])
    assert bounds.tolist() == np.cumsum([0, *map(len, DOCUMENTS)])[:-1].tolist()
    assert len(files.ranges) == len(set(files.ranges))
    shard = np.load(artifact.path("train/web-00000.npy"))
    assert shard[: len(DOCUMENTS[0])].tolist() == DOCUMENTS[0]


def test_a_rank_reads_the_blocks_of_its_rows_only(artifact: Artifact) -> None:
    corpus, files = opened(artifact)
    corpus.read(np.arange(4000, 4100))
    assert files.ranges == [("web-00000.npy", 7168, 2048)]
    corpus.read(np.arange(4050, 4100))
    assert len(files.ranges) == 1


def test_memory_is_bounded_and_what_went_is_read_again(artifact: Artifact) -> None:
    corpus, files = opened(artifact, limit=6000)
    first = corpus.read(np.arange(100))
    for start in (7000, 13000, 0):
        corpus.read(np.arange(start, start + 1500))
    assert np.array_equal(corpus.read(np.arange(100)), first)
    assert [name for name, *_ in files.ranges] == [f"web-0000{i}.npy" for i in (0, 1, 2, 0)]


def test_a_block_that_was_changed_in_the_store_is_found(artifact: Artifact, store: Store) -> None:
    name = f"tokenize/{artifact.key}/{artifact.manifest.attempt}/train/web-00001.npy"
    data = bytearray(store.get(name) or b"")
    data[5000] ^= 1
    store.put(name, bytes(data))
    corpus, _ = opened(artifact)
    corpus.read(np.arange(corpus.tokens - 100, corpus.tokens))
    with pytest.raises(CorruptArtifactError, match=r"web-00001.npy is corrupt in block 4"):
        corpus.read(np.arange(7000, 9000))
    store.put(name, bytes(data[:4000]))
    with pytest.raises(StageError, match="not there"):
        opened(artifact)[0].read(np.arange(7000, 9000))


def test_a_store_that_is_away_is_waited_for(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, away = Store.get_range, [True, True]

    def sometimes(store: Store, *place: Any) -> bytes:
        if away:
            away.pop()
            raise StoreError("unreachable")
        return real(store, *place)

    monkeypatch.setattr(Store, "get_range", sometimes)
    files = ArtifactFiles(artifact, "train", 5.0)
    corpus = stream(json.loads(files.read(INDEX)), files, 0)["web"]
    with caplog.at_level(logging.WARNING), Prefetch(TokenLoader(corpus, 2, 8, 0), 1) as loader:
        assert loader.next_batch().tokens_BL.shape == (2, 8)
    assert caplog.text.count("training data: waiting up to 5 s for the store: unreachable") >= 1
    away[:] = [True] * 9999
    with pytest.raises(StoreError, match=r"tried for 0 s: unreachable"):
        ArtifactFiles(artifact, "train", 0.2).read_range("web-00000.npy", 0, 10)


def test_an_empty_corpus_is_refused(tmp_path: Path, artifact: Artifact) -> None:
    index = write_shards([], 512, tmp_path, 100)
    assert index["dtype"] == "uint16"
    with pytest.raises(StageError, match="the corpus is empty"):
        stream(index, ArtifactFiles(artifact, "train", 0.0), 0)


def test_a_document_longer_than_a_shard_is_a_shard(tmp_path: Path) -> None:
    index = write_shards([("a", [1] * 5), ("a", [2] * 30), ("b", [3]), ("a", [4])], 512, tmp_path, 10)
    assert [(s.name, s.tokens) for each in shards_of(index).values() for s in each] == [
        ("a-00000", 5), ("a-00001", 30), ("a-00002", 1), ("b-00000", 1)
    ]  # fmt: skip
