"""Normalisation, duplicates, the held-out guard, the domain classifier and the quality rules, each by itself."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from hypothesis import given
from hypothesis import strategies as st

from k2.config.ingest import IngestConfig, MinHashConfig, QualityConfig
from k2.data.cleaning import normalize
from k2.data.deduplicate import WORDS, BlockwiseSignature, normalize_and_cluster
from k2.data.documents import write_rows
from k2.data.domains import DomainClassifier
from k2.data.heldout import HeldoutGuard, content_digest, score
from k2.data.ingestion import Ingestion
from k2.data.quality import QualityFilter

SYLLABLES = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in ("n", "r", "st", "mp", "lk", "")]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(SYLLABLES) for _ in range(words))


@given(st.text())
def test_normalising_twice_changes_nothing(raw):
    once = normalize(raw)
    assert normalize(once) == once


@given(st.text(alphabet=st.sampled_from("aé é\t\r\n \x00\x1b\ufeff")))
def test_normal_form(raw):
    clean = normalize(raw)
    assert clean == clean.strip() == unicodedata.normalize("NFC", clean)
    assert not {"\r", "\x00", "\x1b"} & set(clean)
    assert "\n\n\n" not in clean
    assert all(line == line.rstrip() for line in clean.splitlines())


def test_indentation_entities_and_mojibake():
    assert normalize("if a &lt; b:\r\n\treturn  1   \r\n") == "if a &lt; b:\n\treturn  1"
    assert normalize("schÃ¶n") == "schön"
    assert normalize("<p>a &amp; b</p><script>x</script>", "html").strip() == "a & b"


def cluster(tmp_path: Path, shards: list[list[str]]) -> list[dict[int, int]]:
    (tmp_path / "raw").mkdir()
    for index, texts in enumerate(shards):
        rows = [{"id": str(i), "text": t, "source": "s", "meta": {"format": "text"}} for i, t in enumerate(texts)]
        write_rows(tmp_path / "raw" / f"{index:05d}.jsonl.zst", rows)
    found = normalize_and_cluster(tmp_path / "raw", tmp_path / "scratch", MinHashConfig(), seed=1, workers=1)
    for texts, (path, _) in zip(shards, found, strict=True):
        assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == [normalize(t) for t in texts]
    return [clusters for _, clusters in found]


def test_near_duplicates_are_found_across_shards_and_others_are_not(tmp_path, capfd):
    rng = random.Random(0)
    texts = [text(rng, 200) for _ in range(30)]
    near = [" ".join(["zebra", *t.split()[2:]]) for t in texts[:10]]  # Jaccard similarity about 0.98
    first, second = cluster(tmp_path, [texts, ["\x00", *near, text(rng, 200)]])
    assert set(first) == set(range(10))
    assert [second.get(i + 1) for i in range(10)] == [first[i] for i in range(10)]
    assert not {0, 11} & set(second)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shingles", [1, 4096, 4097, 20_000])
def test_blockwise_signatures_are_datatroves(tmp_path, shingles):
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    values = np.random.default_rng(0).integers(2**63, size=(shingles, 1), dtype=np.uint64)
    whole, blockwise = (kind(str(tmp_path), config, WORDS) for kind in (MinhashDedupSignature, BlockwiseSignature))
    assert blockwise.get_signature(values) == whole.get_signature(values)


def test_digest_and_score():
    assert content_digest("A  b\n") == content_digest("a B") != content_digest("ab")
    scores = [score(content_digest(str(i)), 5) / 2**64 for i in range(2000)]
    assert 0.45 < sum(scores) / len(scores) < 0.55
    assert score(content_digest("a"), 1) != score(content_digest("a"), 2)


def test_guard_finds_a_short_text_inside_a_long_one_and_parts_of_long_ones():
    rng = random.Random(1)
    short, long = text(rng, 40), text(rng, 600)
    guard = HeldoutGuard([short, long])
    assert guard.repeats(f"{text(rng, 500)} {short} {text(rng, 500)}")
    assert guard.repeats(" ".join(long.split()[100:200]))
    assert guard.repeats(short.upper().replace(" ", "\n"))
    assert not guard.repeats(" ".join(long.split()[:30]) + " " + text(rng, 500))
    assert not guard.repeats(text(rng, 300))
    assert not HeldoutGuard([]).repeats(short)


def test_classifier_learns_is_deterministic_and_reports_every_domain():
    rng = random.Random(2)
    made = {
        "math": lambda: (
            f"Let x = {rng.randint(1, 99)}. Then x^2 + {rng.randint(1, 9)} = 0 has the root {text(rng, 9)}."
        ),
        "code": lambda: (
            f"def {rng.choice(SYLLABLES)}(a):\n    for {rng.choice(SYLLABLES)} in a:\n        return {{}}\n"
        ),
        "web": lambda: f"Click here to subscribe! {text(rng, 12)}",
        "knowledge": lambda: f"The {text(rng, 2)} is a kind of {text(rng, 12)}, found in the north.",
    }
    examples = [(make(), domain) for domain, make in made.items() for _ in range(30)]
    texts, domains = zip(*examples, strict=True)
    first, second = (DomainClassifier(texts, domains, seed=1, test_fraction=0.3) for _ in range(2))
    fresh = [(make(), domain) for domain, make in made.items() for _ in range(5)]
    assert first.predict([t for t, _ in fresh]) == [domain for _, domain in fresh]
    assert first.accuracy == second.accuracy > 0.9
    assert set(first.accuracy_by_domain) == set(made)
    assert 20 < first.test_examples < 52
    assert first.predict([]) == []


PROSE = "The keeper of the light writes the height of the water and the strength of the wind into a book. "


@pytest.mark.parametrize(
    ("content", "domain", "reason"),
    [
        (f"{PROSE} {text(random.Random(4), 80)}", "knowledge", None),
        ("too short", "knowledge", "gopher_short_doc"),
        (PROSE * 20, "knowledge", "top_4_gram"),
        (" ".join(f"{a} + {b} = {a + b}" for a in range(9) for b in range(9)), "math", "gopher_below_avg_threshold"),
        ("def f(x):\n    return [x] * 3\n", "code", None),
        ("x = '" + "a" * 2000 + "'", "code", "code_long_line"),
        (("a" * 200 + "\n") * 3, "code", "code_long_lines"),
        ("{}[]()<>;;\n" * 30, "code", "code_symbols"),
    ],
)
def test_quality_rules(content, domain, reason):
    assert QualityFilter(QualityConfig(min_words=30)).reason(content, domain) == reason


@given(st.text(min_size=1).map(str.strip).filter(bool), st.sampled_from(["web", "code", "math", "knowledge"]))
def test_quality_judges_any_text(content, domain):
    verdict = QualityFilter(QualityConfig()).reason(content, domain)
    assert verdict is None or verdict.isidentifier()


def test_even_a_tiny_corpus_holds_something_out(tmp_path):
    rng = random.Random(3)
    path = tmp_path / "x.jsonl"
    rows = [{"id": str(i), "text": f"{PROSE}{text(rng, 40)} of and", "source": "s"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [{"text": f"{text(rng, 20)}.", "domain": "knowledge"} for _ in range(20)]
    labelled += [{"text": f"x = {i} + f({i})", "domain": "math"} for i in range(20)]
    ingestion = Ingestion([(path, {})], labelled, IngestConfig(heldout_fraction=1e-9))
    assert (len(list(ingestion.heldout())), len(list(ingestion.training()))) == (1, 3)
