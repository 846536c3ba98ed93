"""Stage `ingest`: clean, unique documents with a domain, and held-out documents set apart."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from k2.config.ingest import IngestConfig
from k2.data.deduplicate import normalize_and_cluster
from k2.data.documents import read_rows, write_rows
from k2.data.ingestion import Ingestion, Shard
from k2.errors import UserError
from k2.execution.contract import Progress, StageResult
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.work import WorkArea

_CLUSTERS = "clusters.json"


def run(
    config: IngestConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Write `documents.jsonl.zst`, `heldout.jsonl.zst`, `dropped.jsonl.zst` and `report.json`.

    Input `corpus`. Raises UserError when nothing is left to train on or to hold out.
    """
    corpus = inputs["corpus"]
    total = int(corpus.statistics["documents"])
    raw = corpus.directory() / "documents"
    with tempfile.TemporaryDirectory(prefix="k2-ingest-", dir=os.environ.get("K2_SCRATCH")) as scratch:
        progress.update(0, total, "documents", step="normalising and hashing")
        shards = _prepared(config, raw, Path(scratch), output.work)
        ingestion = Ingestion(shards, read_rows(corpus.path("labelled.jsonl.zst")), config)
        progress.update(0, total, "documents", step="filtering")
        heldout = write_rows(output.path("heldout.jsonl.zst"), ingestion.heldout())
        kept = write_rows(output.path("documents.jsonl.zst"), ingestion.training())
    _require(kept, heldout, ingestion)
    write_rows(output.path("dropped.jsonl.zst"), ingestion.tally.dropped)
    progress.update(total, total, "documents", kept=kept)
    metrics = _metrics(ingestion, kept, heldout)
    report = {**metrics, "dropped_examples": ingestion.tally.examples}
    output.path("report.json").write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    return StageResult(output.publish(**metrics))


def _prepared(config: IngestConfig, raw: Path, scratch: Path, work: WorkArea) -> list[Shard]:
    """Normalised shards and clusters, the long part of the work, from a run that was interrupted if there was one."""
    saved = work.load(_CLUSTERS)
    if saved is None:
        shards = normalize_and_cluster(raw, scratch, config.minhash, config.seed, config.workers)
        clusters = json.dumps({path.name: list(found.items()) for path, found in shards}).encode()
        work.save({**{path.name: path for path, _ in shards}, _CLUSTERS: clusters})
        return shards
    names: dict[str, list[tuple[int, int]]] = json.loads(saved)
    for name in names:
        (scratch / name).write_bytes(work.load(name) or b"")
    return [(scratch / name, dict(found)) for name, found in names.items()]


def _metrics(ingestion: Ingestion, kept: int, heldout: int) -> dict[str, Any]:
    tally, classifier = ingestion.tally, ingestion.classifier
    return {
        "documents": tally.documents,
        "kept": kept,
        "dropped": tally.reasons(),
        "heldout": heldout,
        "domains": dict(sorted(tally.kept.items())),
        "heldout_domains": dict(sorted(tally.heldout.items())),
        "classifier_accuracy": classifier.accuracy,
        "classifier_accuracy_by_domain": classifier.accuracy_by_domain,
        "classifier_test_examples": classifier.test_examples,
    }


def _require(kept: int, heldout: int, ingestion: Ingestion) -> None:
    for count, what in ((kept, "train on"), (heldout, "hold out")):
        if count == 0:
            raise UserError(
                f"ingest: of {ingestion.tally.documents} documents none is left to {what};"
                f" dropped: {ingestion.tally.reasons()}; give more text or loosen ingest.quality"
            )
