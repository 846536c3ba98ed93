"""Configuration of the rephrase stage; torch-free."""

from typing import Literal

from k2.config.base import Section, StageSection, setting
from k2.config.generator import GeneratorConfig


class FidelityConfig(Section):
    """What a rewrite must keep of its source, per chunk."""

    min_similarity: float = setting(0.8, "least cosine between the sentence embeddings", ge=-1, le=1)
    max_missing_numbers: float = setting(0.0, "largest share of the source's numbers that may vanish", ge=0, le=1)
    max_added_numbers: float = setting(0.0, "largest share of the rewrite's numbers the source lacks", ge=0, le=1)
    max_missing_names: float = setting(0.25, "largest share of the source's names that may vanish", ge=0, le=1)
    max_added_names: float = setting(0.10, "largest share of the rewrite's names the source lacks", ge=0, le=1)
    min_length_ratio: float = setting(0.4, "fewest words of a rewrite, relative to its source", gt=0)
    max_length_ratio: float = setting(2.0, "most words of a rewrite, relative to its source", gt=0)
    max_copied: float = setting(0.6, "largest share of word 5-grams copied verbatim", ge=0, le=1)
    max_repeated: float = setting(0.2, "largest share of word 5-grams said before in the rewritten text", ge=0, le=1)


class RephraseConfig(StageSection):
    """Which documents are rewritten, how, and what passes (K2 report section 2.2)."""

    generator: GeneratorConfig = setting(GeneratorConfig(), "the model that rewrites")
    domains: tuple[Literal["web", "code", "math", "knowledge"], ...] = setting(
        ("knowledge", "math"), "domains whose documents are rewritten"
    )
    max_documents: int | None = setting(None, "documents to rewrite over all domains; null for all", ge=0)
    prose_only: bool = setting(
        False, "rewrite only a document's paragraphs of plain prose: what a small model can do without damage"
    )
    min_words: int = setting(40, "documents with less text to rewrite are passed through only", ge=1)
    max_words: int = setting(
        3000, "documents with more text to rewrite are passed through only (a 4,096-token excerpt)", ge=1
    )
    rewrites_per_document: int = setting(2, "rewrites of each chosen document; K2 stops at two", ge=1, le=2)
    chunk_tokens: int = setting(256, "words and punctuation marks in a chunk, at most", ge=16)
    context_tokens: int = setting(3584, "preceding source and rewritten text shown with a chunk, at most", ge=0)
    candidates: int = setting(1, "samples per chunk; the best one that passes is kept", ge=1, le=16)
    temperature: float = setting(0.7, "sampling temperature; of several candidates the first is greedy", ge=0, le=2)
    top_p: float = setting(0.9, "nucleus sampling mass", gt=0, le=1)
    batch_requests: int = setting(512, "samples of chunks of different documents in flight together", ge=1)
    save_requests: int = setting(64, "answers between two saves of the work done; at most these are redone", ge=1)
    on_reject: Literal["keep_original", "drop"] = setting(
        "keep_original", "what takes the place of a rejected chunk inside a rewritten document"
    )
    fidelity: FidelityConfig = setting(FidelityConfig(), "what a rewrite must keep of its source")
