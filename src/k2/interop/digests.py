"""What a folder's files should be: sizes and SHA-256 in `manifest.json`, or as a download from the Hugging Face Hub
left them behind. Torch-free.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2.errors import UserError
from k2.store.artifacts import file_sha256

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and hex SHA-256 of a file."""

    size: int
    sha256: str


def file_digest(path: Path) -> FileDigest:
    """Read a file and say what it is."""
    return FileDigest(path.stat().st_size, file_sha256(path))


def digests(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Digests of files by their paths relative to `folder`, computed in parallel."""
    ordered = sorted(names)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(lambda name: file_digest(folder / name), ordered), strict=True))


def verified(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Digests of files, compared with those the folder was published with, if it says.

    Raises UserError naming the file, what is expected and what was found.
    """
    wanted = set(names)
    expected = _published(folder)
    for name in sorted(expected):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file, but {MANIFEST} lists it")
        size = (folder / name).stat().st_size
        if size != expected[name].size:
            raise UserError(f"{folder / name}: expected {expected[name].size} bytes, found {size}")
    found = digests(folder, wanted | set(expected))
    for name, digest in (expected or _downloaded(folder, wanted)).items():
        if found[name].sha256 != digest.sha256:
            raise UserError(f"{folder / name}: expected sha256 {digest.sha256}, found {found[name].sha256}")
    return {name: found[name] for name in sorted(wanted)}


def combined(files: Mapping[str, FileDigest]) -> str:
    """One SHA-256 for many files: equal names and contents, equal digest."""
    rows = sorted((name, digest.size, digest.sha256) for name, digest in files.items())
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, request: Mapping[str, Any], files: Mapping[str, FileDigest]) -> None:
    """Say what the folder was made from and what its files are."""
    body = {"request": request, "files": {name: asdict(files[name]) for name in sorted(files)}}
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def read_request(folder: Path) -> dict[str, Any] | None:
    """What a folder with a manifest was made from, or None."""
    request: dict[str, Any] | None = _manifest(folder).get("request")
    return request


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _published(folder: Path) -> dict[str, FileDigest]:
    try:
        return {name: FileDigest(**entry) for name, entry in _manifest(folder).get("files", {}).items()}
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST}: files must map names to size and sha256 ({error})") from error


def _downloaded(folder: Path, names: set[str]) -> dict[str, FileDigest]:
    """Digests the Hub gave for its large files; `hf download --local-dir` keeps them beside the files."""
    result = {}
    for name in sorted(names):
        note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        lines = note.read_text().split() if note.is_file() else []
        if len(lines) >= 2 and _SHA256.fullmatch(lines[1]):
            result[name] = FileDigest(0, lines[1])
    return result
