"""The user's corpus: files, folders, globs and S3 prefixes. What cannot be read is named, never fatal."""

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import pyarrow
import pyarrow.parquet

from k2.data.documents import Document, Problem, Record
from k2.errors import UserError
from k2.store.client import Store

TEXT_SUFFIXES = {".txt": "text", ".md": "text", ".rst": "text", ".html": "html", ".htm": "html"}
ROW_SUFFIXES = (".jsonl", ".parquet")
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    "": lambda file: file,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    # zstandard's own reader ends without an error where a torn file does
    ".zst": lambda file: io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")),
}
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)


@dataclass(frozen=True)
class File:
    """One input file: its name below the given path, what changes when its content does, and how to open it."""

    name: str
    stamp: str
    open: Callable[[], BinaryIO]


def find_files(path: str, store: Store) -> list[File]:
    """The files behind one entry of `paths`, sorted by name; hidden ones are left out.

    Raises UserError when there is none.
    """
    files = _stored_files(path, store) if path.startswith("s3://") else _local_files(path)
    if not files:
        raise UserError(f"corpus {path!r} does not exist or is empty; give a file, a folder, a glob or an s3:// prefix")
    return files


def _stored_files(url: str, store: Store) -> list[File]:
    def opener(name: str) -> Callable[[], BinaryIO]:
        return lambda: io.BytesIO(store.get(name) or b"")

    prefix = store.name(url)
    folder = prefix.rpartition("/")[0]
    return [File(i.name.removeprefix(folder).lstrip("/"), i.etag, opener(i.name)) for i in store.list(prefix)]


def _local_files(path: str) -> list[File]:
    anchor = Path(path)
    while glob.has_magic(str(anchor)):
        anchor = anchor.parent
    base = anchor.parent if str(anchor) == str(Path(path)) else anchor
    found = {file for root in glob.glob(path, recursive=True) or [path] for file in _files_below(Path(root))}
    return [_local_file(file, file.relative_to(base).as_posix()) for file in sorted(found)]


def _files_below(root: Path) -> Iterator[Path]:
    paths = root.rglob("*") if root.is_dir() else [root]
    return (path for path in paths if path.is_file() and not path.name.startswith("."))


def _local_file(path: Path, name: str) -> File:
    status = path.stat()
    return File(name, f"{status.st_size}-{status.st_mtime_ns}", lambda: path.open("rb"))


def read_file(file: File, source: str) -> Iterator[Record]:
    """The documents of a file, and a Problem for each record that is none."""
    name = PurePosixPath(file.name)
    packing = name.suffix.lower() if name.suffix.lower() in _OPENERS else ""
    suffix = PurePosixPath(file.name.lower().removesuffix(packing)).suffix
    if suffix not in TEXT_SUFFIXES and suffix not in ROW_SUFFIXES:
        yield Problem(file.name, "unsupported file type")
        return
    try:
        with file.open() as raw, _OPENERS[packing](raw) as content:
            if suffix == ".jsonl":
                yield from _json_lines(file.name, content, source)
            elif suffix == ".parquet":
                yield from _parquet(file.name, content, source)
            else:
                yield _text(file.name, content.read(), source, TEXT_SUFFIXES[suffix])
    except _READ_ERRORS as error:
        yield Problem(file.name, f"unreadable: {type(error).__name__}")


def _text(where: str, data: bytes, source: str, form: str) -> Record:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Problem(where, "not UTF-8")
    return _document(where, text, source, form)


def _document(where: str, text: object, source: str, form: str) -> Record:
    if not isinstance(text, str):
        return Problem(where, "no text field")
    if not text.strip():
        return Problem(where, "no text")
    # a lone surrogate, which JSON can spell, is no text that UTF-8 could hold
    return Document(where, text.encode("utf-8", "replace").decode(), source, {"format": form})


def _json_lines(name: str, content: IO[bytes], source: str) -> Iterator[Record]:
    for number, line in enumerate(content, 1):
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            yield Problem(where, "not UTF-8")
        except (json.JSONDecodeError, RecursionError):
            yield Problem(where, "not JSON")
        else:
            yield _document(where, row.get("text") if isinstance(row, dict) else None, source, "text")


def _parquet(name: str, content: IO[bytes], source: str) -> Iterator[Record]:
    table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content.read()))
    if "text" not in table.schema_arrow.names:
        yield Problem(name, "no text field")
        return
    number = 0
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield _document(f"{name}:{number}", text, source, "text")
