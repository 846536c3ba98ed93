"""The fixture corpus goes through corpus, ingest and tokenize on a real object store."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from k2.config.corpus import CorpusConfig
from k2.config.ingest import IngestConfig, QualityConfig
from k2.config.tokenize import TokenizeConfig
from k2.data.deduplicate import normalize_and_cluster
from k2.data.documents import read_rows, write_rows
from k2.data.heldout import HeldoutGuard
from k2.data.ingestion import Ingestion
from k2.data.shards import shards_of
from k2.data.snapshot import Snapshot, collect, labelled_examples, write_shards
from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.execution.contract import StageResult
from k2.stages import corpus, ingest, tokenize
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

FIXTURE = Path(__file__).parent / "corpus"
INGEST = IngestConfig(heldout_fraction=0.08, quality=QualityConfig(min_words=30))
TOKENIZE = TokenizeConfig(vocab_size=1024, special_slots=20, digits_per_token=1, chat_repeats=100)
Harness = Callable[..., StageResult]


class Ingested(NamedTuple):
    heldout: list[dict]
    training: list[dict]
    ingestion: Ingestion


def snapshot(harness: Harness, *paths: str) -> StageResult:
    return harness(corpus.run, CorpusConfig(paths=paths, labelled_per_source=60), {})


def rows(result: StageResult, name: str) -> list[dict]:
    return list(read_rows(result.artifact.path(name)))


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    """The fixture corpus through the functions behind the stages, once for all tests."""
    raw, scratch = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("scratch")
    config = CorpusConfig(paths=(str(FIXTURE),), labelled_per_source=60)
    write_shards(collect(config, None, Snapshot()), raw, config.shard_bytes)
    shards = normalize_and_cluster(raw, scratch, INGEST.minhash, INGEST.seed, workers=1)
    ingestion = Ingestion(shards, labelled_examples(config), INGEST)
    return Ingested(list(ingestion.heldout()), list(ingestion.training()), ingestion)


def test_corpus_reads_every_format_and_names_what_it_cannot_read(stage_harness: Harness) -> None:
    result = snapshot(stage_harness, str(FIXTURE))
    assert {(row["where"], row["reason"]) for row in rows(result, "problems.jsonl.zst")} == {
        ("corpus/articles.jsonl:100", "not JSON"),
        ("corpus/articles.jsonl:101", "no text field"),
        ("corpus/articles.jsonl:102", "no text field"),
        ("corpus/articles.jsonl:103", "no text"),
        ("corpus/articles.jsonl:104", "not UTF-8"),
        ("corpus/notes/figure.bin", "unsupported file type"),
        ("corpus/notes/latin.txt", "not UTF-8"),
    }
    documents = rows(result, "documents/00000.jsonl.zst")
    assert len(documents) == result.metrics["documents"] == 99 + 9 + 32 + 16 + 28 + 3 + 1
    assert {row["meta"]["format"] for row in documents} == {"text", "html"}


COPIES = ["exact_duplicate"] * 3 + ["near_duplicate"] * 4 + ["gopher_short_doc", "gopher_enough_stop_words"]


def test_copies_and_poor_text_are_dropped_and_the_rest_is_kept(ingested: Ingested) -> None:
    tally = ingested.ingestion.tally
    dropped = {row["id"]: row["reason"] for row in tally.dropped}
    copies = {f"corpus/copies.jsonl.gz:{line}": reason for line, reason in enumerate(COPIES, 1)}
    assert {name: dropped.get(name) for name in copies} == copies
    assert tally.documents == 188 == len(ingested.training) + len(ingested.heldout) + len(tally.dropped)
    assert len(ingested.training) > 150


def test_domains_are_right_on_text_the_classifier_was_not_made_for(ingested: Ingested) -> None:
    truth = {"articles": "knowledge", "code": "code", "mathematics": "math", "web": "web"}
    found = [(truth.get(row["id"].split("/")[1].partition(".")[0]), row["domain"]) for row in ingested.training]
    known = [(right, domain) for right, domain in found if right]
    assert len(known) > 140
    assert sum(right == domain for right, domain in known) / len(known) >= 0.95
    assert ingested.ingestion.classifier.accuracy > 0.85


def test_text_is_normalised_and_markup_is_gone(ingested: Ingested) -> None:
    documents = {row["id"]: row["text"] for row in ingested.training + ingested.heldout}
    page = documents["corpus/page.html"]
    assert "On the river" in page
    assert "<p>" not in page
    assert "hidden" not in page
    assert not [name for name, text in documents.items() if "\r" in text or "\ufeff" in text or "\n\n\n" in text]


def test_code_survives_with_its_indentation(ingested: Ingested) -> None:
    code = [row for row in ingested.training if row["id"].startswith("corpus/code.jsonl")]
    assert len(code) > 20
    assert all("\n    " in row["text"] for row in code)


def test_no_training_document_repeats_a_heldout_one(ingested: Ingested) -> None:
    guard = HeldoutGuard(row["text"] for row in ingested.heldout)
    assert 3 <= len(ingested.heldout) <= 40
    assert all(guard.repeats(row["text"]) for row in ingested.heldout)
    assert not any(guard.repeats(row["text"]) for row in ingested.training)


def test_ingest_is_deterministic_and_shards_do_not_change_what_is_kept(stage_harness: Harness) -> None:
    whole = snapshot(stage_harness, str(FIXTURE))
    config = CorpusConfig(paths=(str(FIXTURE),), labelled_per_source=60, shard_bytes=60_000)
    sharded = stage_harness(corpus.run, config, {})
    assert len([name for name in sharded.artifact.files if name.startswith("documents/")]) > 2
    results = [stage_harness(ingest.run, INGEST, {"corpus": source.artifact}) for source in (whole, whole, sharded)]
    assert results[0].artifact.digest == results[1].artifact.digest
    assert rows(results[0], "documents.jsonl.zst") == rows(results[2], "documents.jsonl.zst")


def test_an_interrupted_ingest_does_not_prepare_twice(store: Store, tmp_path: Path) -> None:
    raw, first, second = (tmp_path / name for name in ("raw", "first", "second"))
    raw.mkdir()
    second.mkdir()
    write_shards(collect(CorpusConfig(paths=(str(FIXTURE),)), None, Snapshot()), raw, 60_000)
    with Lease(store, "work/key/lease.json") as lease:
        prepared = ingest._prepared(INGEST, raw, first, WorkArea(store, "key", lease))
    with Lease(store, "work/key/lease.json") as lease:
        resumed = ingest._prepared(INGEST, tmp_path / "gone", second, WorkArea(store, "key", lease))
    assert len(prepared) > 1
    assert [(p.read_bytes(), found) for p, found in prepared] == [(p.read_bytes(), found) for p, found in resumed]


def test_tokenize_keeps_every_document(stage_harness: Harness, make_artifact, ingested: Ingested, tmp_path) -> None:
    splits = {"documents": ingested.training, "heldout": ingested.heldout}
    for name, documents in splits.items():
        write_rows(tmp_path / f"{name}.jsonl.zst", documents)
    source = make_artifact("ingest", {f"{name}.jsonl.zst": tmp_path / f"{name}.jsonl.zst" for name in splits})
    inputs = {"documents": source, "heldout": source}
    result = stage_harness(tokenize.run, TOKENIZE, inputs)
    assert stage_harness(tokenize.run, TOKENIZE, inputs).artifact.digest == result.artifact.digest
    folder = result.artifact.directory()
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert result.metrics["vocab_size"] == tokenizer.vocab_size == 1024
    check_tokens(tokenizer, folder / "heldout/tokens.npy", folder / "heldout/offsets.npy", ingested.heldout)
    domains = shards_of(result.artifact.json("train/index.json"))
    assert {row["domain"] for row in ingested.training} == set(domains)
    for domain, (shard,) in domains.items():
        documents = [row for row in ingested.training if row["domain"] == domain]
        check_tokens(
            tokenizer, folder / f"train/{shard.name}.npy", folder / f"train/{shard.name}.offsets.npy", documents
        )
    assert result.metrics["train_tokens"] == sum(shard.tokens for (shard,) in domains.values())
    assert all(len(tokenizer.encode(name)) == 1 for name in ("system", "user", "assistant", "tool", "functions"))
    assert len(tokenizer.encode('{"query":"')) <= 4


def check_tokens(tokenizer: Tokenizer, tokens: Path, offsets: Path, documents: list[dict[str, Any]]) -> None:
    array = np.load(tokens)
    assert array.dtype == np.uint16
    for row, (start, end) in zip(documents, pairwise(np.load(offsets)), strict=True):
        assert tokenizer.decode(array[start:end].tolist()) == row["text"] + "[EOS]"


@pytest.mark.parametrize("suffix", ["missing", "*.nothing", "notes/figure.bin", "notes/latin.txt"])
def test_corpus_without_text_is_the_users_error(stage_harness: Harness, suffix: str) -> None:
    with pytest.raises(UserError, match=r"corpus .*(does not exist|holds no text)"):
        snapshot(stage_harness, str(FIXTURE / suffix))


def test_a_stored_corpus_equals_the_local_one(stage_harness: Harness, store: Store) -> None:
    for path in sorted(FIXTURE.rglob("*")):
        if path.is_file():
            store.upload(path, f"input/corpus/{path.relative_to(FIXTURE)}")
    stored = rows(snapshot(stage_harness, store.url("input/corpus")), "documents/00000.jsonl.zst")
    local = rows(snapshot(stage_harness, str(FIXTURE)), "documents/00000.jsonl.zst")
    assert [(row["id"], row["text"]) for row in stored] == [(row["id"], row["text"]) for row in local]


def test_the_environment_gives_every_domain(stage_harness: Harness) -> None:
    config = CorpusConfig(max_bytes=20_000, labelled_per_source=20)
    result = stage_harness(corpus.run, config, {})
    labelled = rows(result, "labelled.jsonl.zst")
    assert set(result.metrics["sources"]) == set(config.sources)
    assert all(source["documents"] and source["version"] for source in result.metrics["sources"].values())
    assert {row["domain"] for row in labelled} == {"web", "code", "math", "knowledge"}
    documents = rows(result, "documents/00000.jsonl.zst")
    assert not {row["text"] for row in labelled} & {row["text"][:3000] for row in documents}
    assert json.loads(result.artifact.path("report.json").read_text())["problems"] == {}
