"""Where the text comes from."""

from typing import Literal

from k2.config.base import StageSection, setting

SourceName = Literal["topics", "stdlib", "sympy", "scipy", "numpy", "networkx", "code", "projects"]
ALL_SOURCES: tuple[SourceName, ...] = (
    "topics",
    "stdlib",
    "sympy",
    "scipy",
    "numpy",
    "networkx",
    "code",
    "projects",
)


class CorpusConfig(StageSection):
    """The `corpus` stage: a snapshot of raw documents, and labelled examples for the domain classifier."""

    paths: tuple[str, ...] = setting(
        (), "files, folders, globs or s3:// prefixes of txt md rst html jsonl parquet; none: text the environment has"
    )
    sources: tuple[SourceName, ...] = setting(
        ALL_SOURCES, "which text of the environment to take when no path is given"
    )
    max_bytes: int | None = setting(
        None, "stop reading a path or source after this many bytes, seeded choice; null: all", gt=0
    )
    min_characters: int = setting(200, "shorter docstrings are left out", ge=1)
    labelled_per_source: int = setting(400, "labelled examples kept from each source for the domain classifier", ge=10)
    shard_bytes: int = setting(268_435_456, "a new snapshot file begins after this many bytes of text", gt=0)
