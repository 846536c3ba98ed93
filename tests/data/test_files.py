"""Every format under every compression gives the same documents; damage is named, never fatal."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from k2.config.corpus import CorpusConfig
from k2.data.documents import Document, Problem, read_rows, stable_order, write_rows
from k2.data.files import File, find_files, read_file
from k2.data.snapshot import Snapshot, collect, fingerprint

TEXTS = ["first text", "second text, with ünïcode"]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def parquet(texts: list, column: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({column: texts}), sink)
    return sink.getvalue()


def jsonl(texts: list) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(name: str, data: bytes) -> list[Document | Problem]:
    return list(read_file(File(name, "", lambda: io.BytesIO(data)), "here"))


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(("suffix", "make"), [(".jsonl", jsonl), (".parquet", parquet)])
def test_rows(packing, suffix, make):
    name = f"data{suffix}{packing}"
    documents = read(name, PACK[packing](make(TEXTS)))
    assert [document.text for document in documents] == TEXTS
    assert [document.id for document in documents] == [f"{name}:1", f"{name}:2"]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".html", ".HTM"])
def test_whole_files(packing, suffix):
    (document,) = read(f"a/b{suffix}{packing}", PACK[packing](b"\xef\xbb\xbf" + TEXTS[1].encode()))
    assert document.text == TEXTS[1]
    assert document.meta == {"format": "html" if suffix in (".html", ".HTM") else "text"}


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_torn_archives_keep_nothing_silent(packing):
    lines = jsonl([f"line {number} {number * 7919}" for number in range(4000)])
    records = read(f"x.jsonl{packing}", PACK[packing](lines)[:-200])
    problems = [record for record in records if isinstance(record, Problem)]
    assert problems
    assert len(records) < 4001


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.parquet", b"PAR1 no more", "unreadable: ArrowInvalid"),
        ("x.parquet", parquet(TEXTS, "body"), "no text field"),
        ("x.parquet", parquet([None]), "no text field"),
        ("x.gz", gzip.compress(b"a", mtime=0), "unsupported file type"),
        ("x.pdf", b"%PDF", "unsupported file type"),
        ("x.txt", b"\xff", "not UTF-8"),
        ("x.txt", b" \n", "no text"),
        ("x.txt.gz", b"plain", "unreadable: BadGzipFile"),
        ("x.jsonl", b"{\n", "not JSON"),
        ("x.jsonl", b'{"text": ["a"]}\n', "no text field"),
        ("x.jsonl", b"NaN\n", "no text field"),
    ],
)
def test_problems_are_named(name, data, reason):
    (problem,) = read(name, data)
    assert problem.reason == reason
    assert problem.where.startswith(name)


@given(st.binary(max_size=200))
def test_no_bytes_are_fatal(data):
    for name in ("x.txt", "x.jsonl", "x.parquet", "x.jsonl.gz", "x.txt.zst", "x.html.xz", "x.md.bz2"):
        for record in read(name, data):
            assert isinstance(record, Problem) or record.text.encode()


def test_a_lone_surrogate_can_be_stored():
    (document,) = read("x.jsonl", b'{"text": "a\\ud800b"}\n')
    assert document.text == "a?b"


def test_deeply_nested_json_is_a_problem():
    (problem,) = read("x.jsonl", b"[" * 100_000 + b"\n")
    assert problem.reason == "not JSON"


def test_globs_folders_and_files(tmp_path: Path):
    for name in ("one/a.txt", "one/.hidden.txt", "two/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [file.name for file in find_files(str(tmp_path / "*"), None)] == ["one/a.txt", "two/b.txt"]
    assert [file.name for file in find_files(str(tmp_path / "one"), None)] == ["one/a.txt"]
    assert [file.name for file in find_files(str(tmp_path / "one" / "a.txt"), None)] == ["a.txt"]
    assert [file.name for file in find_files(str(tmp_path / "**" / "*.txt"), None)] == ["one/a.txt", "two/b.txt"]


def test_files_of_one_name_in_two_folders_are_both_read(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text(f"text of {name}")
    config = CorpusConfig(paths=(str(tmp_path / "*" / "same.txt"),))
    assert {document.text for document in collect(config, None, Snapshot())} == {"text of one", "text of two"}


def test_the_cap_chooses_by_seed(tmp_path: Path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("x" * 100)

    def chosen(seed: int) -> list[str]:
        config = CorpusConfig(paths=(str(tmp_path),), max_bytes=1000, seed=seed)
        return [document.id for document in collect(config, None, Snapshot())]

    assert len(chosen(1)) == 10
    assert chosen(1) == chosen(1) != chosen(2)


def test_the_fingerprint_follows_the_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    config = CorpusConfig(paths=(str(tmp_path),))
    before = fingerprint(config, None)
    assert fingerprint(config, None) == before
    (tmp_path / "b.txt").write_text("two")
    assert fingerprint(config, None) != before
    assert fingerprint(CorpusConfig(), None) != fingerprint(CorpusConfig(sources=("topics",)), None)


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3), max_size=5))
def test_rows_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "x.jsonl.zst"
    assert write_rows(path, rows) == len(rows)
    assert list(read_rows(path)) == rows


def test_the_order_survives_additions():
    names = [f"n{number}" for number in range(50)]
    order = stable_order(names, 3)
    assert [name for name in stable_order([*names, "new"], 3) if name != "new"] == order
    assert stable_order(names, 4) != order
