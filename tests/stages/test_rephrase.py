"""The rephrase stage with the real embedded model on the real store."""

import ast
import inspect
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.lib._iotools
import pytest
from sympy.ntheory import primetest

from k2.config.rephrase import RephraseConfig
from k2.data.documents import read_rows, write_rows
from k2.execution.contract import StageResult
from k2.stages.rephrase import run
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

KNOWLEDGE = (
    "Rivers carry water from the mountains to the sea. On their way they shape the valleys that they cross.\n\n"
    "Lakes store the water of rivers. Some of them dry out in hot summers, and the fish have to leave.\n"
)


def docstrings(module: Any) -> list[str]:
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, ast.FunctionDef)]
    return [text for text in texts if text and len(text.split()) > 20]


@pytest.fixture
def documents(tmp_path: Path, make_artifact: Callable[..., Artifact]) -> Artifact:
    rows = [{"id": "k", "text": KNOWLEDGE, "domain": "knowledge", "source": "test"}]
    rows += [
        {"id": f"m{n}", "text": " ".join(text.split()[:45]), "domain": "math", "source": "sympy"}
        for n, text in enumerate(docstrings(primetest))
    ]
    rows += [
        {"id": f"c{n}", "text": text, "domain": "code", "source": "numpy"}
        for n, text in enumerate(docstrings(numpy.lib._iotools))
    ]
    write_rows(tmp_path / "rows", rows)
    return make_artifact("ingest", {"documents.jsonl.zst": tmp_path / "rows"})


def config(**values: Any) -> RephraseConfig:
    defaults = {
        "max_documents": 2,
        "min_words": 15,
        "rewrites_per_document": 1,
        "chunk_tokens": 32,
        "context_tokens": 100,
        "temperature": 0.4,
        "save_requests": 2,
        "generator": {"batch_tokens": 4096},
    }
    return RephraseConfig(**{**defaults, **values})


@pytest.fixture(autouse=True, scope="module")
def shared_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One weight cache for the module: the conversion costs seconds."""
    return tmp_path_factory.mktemp("k2-home")


def execute(store: Store, key: str, documents: Artifact, progress: Any) -> StageResult:
    with Lease(store, f"work/{key}/lease.json") as lease:
        writer = ArtifactWriter(store, "rephrase", key, WorkArea(store, key, lease))
        try:
            return run(config(), {"documents": documents}, writer, progress=progress)
        finally:
            writer.discard()


def test_run_then_killed_run_ends_in_the_same_bytes(
    store: Store, documents: Artifact, progress: Any, monkeypatch: pytest.MonkeyPatch, shared_weights: Path
) -> None:
    monkeypatch.setenv("K2_HOME", str(shared_weights))
    whole = execute(store, uuid.uuid4().hex, documents, progress)
    metrics, artifact = whole.metrics, whole.artifact
    assert {"chunks", "accepted", "rejected", "mean_similarity"} <= set(metrics)
    assert metrics["chunks"] == metrics["accepted"] + metrics["rejected"] >= 3
    assert metrics["math_chunks"] >= 1
    assert metrics["multi_chunk_documents"] >= 1
    originals = list(read_rows(documents.path("documents.jsonl.zst")))
    rows = list(read_rows(artifact.path("documents.jsonl.zst")))
    assert rows[: len(originals)] == originals
    assert len(rows) - len(originals) == metrics["rewritten_documents"]
    assert all(row["origin"] in {"k", *(o["id"] for o in originals)} and row["style"] for row in rows[len(originals) :])
    attempts = [json.loads(line) for line in artifact.path("rewrites.jsonl").read_text().splitlines()]
    assert len(attempts) == metrics["rewrites"]
    assert any(attempt["context"] for attempt in attempts)
    assert sum(artifact.json("report.json")["similarity_histogram"]["counts"]) == len(attempts)

    save, saved = WorkArea.save, []

    def save_once(area: WorkArea, *args: Any, **kwargs: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(True)
        save(area, *args, **kwargs)

    key = uuid.uuid4().hex
    monkeypatch.setattr(WorkArea, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        execute(store, key, documents, progress)
    monkeypatch.setattr(WorkArea, "save", save)
    again = execute(store, key, documents, progress)
    assert again.artifact.digest == artifact.digest
    assert again.metrics == metrics


def test_nothing_to_rewrite_passes_documents_through(
    stage_harness: Callable[..., StageResult], documents: Artifact
) -> None:
    result = stage_harness(run, config(max_documents=0), {"documents": documents})
    assert result.metrics["chunks"] == result.metrics["rewrites"] == 0
    rows = list(read_rows(result.artifact.path("documents.jsonl.zst")))
    assert rows == list(read_rows(documents.path("documents.jsonl.zst")))
