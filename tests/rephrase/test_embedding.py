"""Our embeddings are those of sentence-transformers, whatever the padding."""

import importlib.metadata

import pytest
import torch

from k2.rephrase.embedding import PACKAGE, Embedder

TEXTS = ["A short text.", "The stock market fell sharply after the bank raised its rates, and nobody had expected it."]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def test_embeddings_equal_sentence_transformers(embedder: Embedder) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    files = importlib.metadata.distribution(PACKAGE).files or []
    folder = next(file.locate().parent for file in files if file.name == "modules.json")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embedder.embed(TEXTS), theirs.clone(), atol=1e-4, rtol=1e-4)


def test_a_text_is_its_own_equal_and_padding_does_not_count(embedder: Embedder) -> None:
    assert embedder.similarity(TEXTS[1], TEXTS[1]) == pytest.approx(1.0)
    torch.testing.assert_close(embedder.embed(TEXTS)[:1], embedder.embed(TEXTS[:1]), atol=1e-5, rtol=1e-4)
