"""The sections of the data stages: defaults are those of the large recipe, and mistakes are refused by name."""

import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from k2.config.base import semantic_values
from k2.config.corpus import ALL_SOURCES, CorpusConfig
from k2.config.ingest import IngestConfig, QualityConfig
from k2.config.tokenize import TokenizeConfig


def test_defaults_are_the_large_recipe() -> None:
    tokenize = TokenizeConfig()
    assert (tokenize.vocab_size, tokenize.special_slots, tokenize.digits_per_token) == (163_840, 256, 3)
    assert (IngestConfig().minhash.buckets, IngestConfig().minhash.hashes_per_bucket) == (14, 8)
    assert CorpusConfig().sources == ALL_SOURCES


@pytest.mark.parametrize(
    ("section", "values", "field"),
    [
        (CorpusConfig, {"sources": ["wikipedia"]}, "sources"),
        (CorpusConfig, {"max_bytes": 0}, "max_bytes"),
        (CorpusConfig, {"path": "x"}, "path"),
        (IngestConfig, {"heldout_fraction": 1.0}, "heldout_fraction"),
        (IngestConfig, {"quality": {"min_words": 0}}, "quality"),
        (QualityConfig, {"min_alpha_words": 1.5}, "min_alpha_words"),
        (TokenizeConfig, {"special_slots": 19}, "special_slots"),
        (TokenizeConfig, {"digits_per_token": 0}, "digits_per_token"),
    ],
)
def test_mistakes_are_named(section, values, field) -> None:
    with pytest.raises(ValidationError) as error:
        section(**values)
    assert error.value.errors()[0]["loc"][0] == field


def test_a_vocabulary_must_hold_bytes_and_special_tokens() -> None:
    assert TokenizeConfig(vocab_size=512).vocab_size == 512
    with pytest.raises(ValidationError, match="vocab_size must be at least"):
        TokenizeConfig(vocab_size=600, special_slots=400)


def test_workers_do_not_change_the_key() -> None:
    assert semantic_values(IngestConfig(workers=1)) == semantic_values(IngestConfig(workers=8))
    assert semantic_values(IngestConfig()) != semantic_values(IngestConfig(quality=QualityConfig(min_words=30)))


def test_sections_import_nothing_heavy() -> None:
    code = (
        "import sys, k2.config.corpus, k2.config.ingest, k2.config.tokenize;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'sklearn', 'datatrove', 'tokenizers')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
