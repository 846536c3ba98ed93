"""How raw documents become clean, unique, labelled ones."""

from k2.config.base import Section, StageSection, setting


class MinHashConfig(Section):
    """Near-duplicate detection: two documents that agree in all hashes of one bucket are one cluster."""

    ngram: int = setting(5, "words per shingle", ge=1)
    buckets: int = setting(14, "buckets (bands)", ge=1)
    hashes_per_bucket: int = setting(
        8, "hashes per bucket; 14 x 8 finds 92% of pairs with Jaccard similarity 0.8", ge=1
    )


class QualityConfig(Section):
    """What a document must look like; prose by Gopher's rules, web pages by FineWeb's as well, code by its lines."""

    min_words: int = setting(50, "fewest words of a prose document (Gopher)", ge=1)
    max_words: int = setting(100_000, "most words of a prose document (Gopher)", ge=1)
    min_stop_words: int = setting(2, "distinct English stop words that prose must hold (Gopher)", ge=0)
    min_alpha_words: float = setting(0.8, "share of words with a letter in web and knowledge text (Gopher)", ge=0, le=1)
    min_alpha_words_math: float = setting(0.5, "the same for mathematics, where symbols are words", ge=0, le=1)
    max_code_line: int = setting(1000, "longest line of code, in characters", ge=1)
    max_mean_code_line: int = setting(100, "longest mean line of code, in characters", ge=1)
    min_code_alphanumeric: float = setting(0.25, "share of letters and digits in code", ge=0, le=1)


class IngestConfig(StageSection):
    """The `ingest` stage."""

    heldout_fraction: float = setting(0.002, "share of document clusters set apart for evaluation", gt=0, lt=1)
    minhash: MinHashConfig = setting(MinHashConfig(), "near-duplicate detection")
    quality: QualityConfig = setting(QualityConfig(), "quality filters by domain")
    test_fraction: float = setting(
        0.25, "share of the labelled examples that measures the domain classifier", gt=0, lt=1
    )
    workers: int = setting(1, "processes that normalise and hash, one shard each", semantic=False, ge=1)
