"""Lineage over artifacts that were really published."""

import json
import uuid

import pytest

from k2.errors import StageError, UserError
from k2.monitoring.lineage import lineage, render_tree, walk
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea


def publish(store: Store, kind: str, **inputs: Artifact) -> Artifact:
    key = uuid.uuid4().hex
    with Lease(store, f"work/{key}/lease.json") as lease:
        provenance = {"inputs": {name: artifact.uri for name, artifact in inputs.items()}}
        writer = ArtifactWriter(store, kind, key, WorkArea(store, key, lease), provenance)
        writer.path("file").write_text(kind)
        artifact = writer.publish()
        writer.discard()
        return artifact


@pytest.fixture
def export(store: Store) -> Artifact:
    corpus = publish(store, "corpus")
    pretrain = publish(store, "pretrain", tokens=publish(store, "tokenize", documents=corpus, heldout=corpus))
    synthesize = publish(store, "synthesize")
    sft = publish(store, "sft", model=pretrain, trajectories=synthesize)
    return publish(store, "export", model=sft, trajectories=synthesize)


def test_walks_back_to_the_documents_and_names_shared_artifacts_once(store: Store, export: Artifact) -> None:
    root = lineage(store, export.uri)
    kinds = [node["kind"] for node in walk(root)]
    assert sorted(kinds) == ["corpus", "export", "pretrain", "sft", "synthesize", "tokenize"]
    assert root["digest"] == export.digest
    assert list(root["inputs"]) == ["model", "trajectories"]
    assert json.loads(json.dumps(root)) == root


def test_tree_reads_like_a_tree(store: Store, export: Artifact) -> None:
    lines = render_tree(lineage(store, export.uri)).splitlines()
    assert lines[0] == f"export {export.digest[:12]}  {export.uri}"
    assert [line.split(": ")[0] for line in lines[1:3]] == ["├─ model", "│  ├─ model"]
    assert lines[-1].startswith("└─ trajectories: synthesize")
    assert sum("corpus" in line.split("s3://")[0] for line in lines) == 2


def test_a_missing_ancestor_is_named(store: Store) -> None:
    corpus = publish(store, "corpus")
    tokens = publish(store, "tokenize", documents=corpus)
    store.delete(f"corpus/{corpus.key}/manifest.json")
    with pytest.raises(StageError, match=corpus.uri):
        lineage(store, tokens.uri)
    with pytest.raises(UserError, match="not in this store"):
        lineage(store, "s3://elsewhere/x/y/z")
