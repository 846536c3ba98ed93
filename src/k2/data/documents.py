"""Documents on disk: JSON lines, Zstandard-compressed, the same bytes for the same rows."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zstandard


@dataclass(frozen=True)
class Document:
    """One raw document of the snapshot. `meta` holds `format` (text or html) and a `domain` where it is known."""

    id: str
    text: str
    source: str
    meta: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The JSON object of the snapshot."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """A record that could not be read: where it is and why."""

    where: str
    reason: str


Record = Document | Problem


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of JSON: sorted keys, UTF-8."""
    return (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as `.jsonl.zst` and return their number."""
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as file:
        return sum(1 for row in rows if file.write(json_line(row)))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `.jsonl.zst` file, one at a time."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as file:
        for line in io.TextIOWrapper(file, encoding="utf-8", newline="\n"):
            yield json.loads(line)


def stable_order(names: Iterable[str], seed: int) -> list[str]:
    """The names in an order that the seed shuffles and that additions do not disturb."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
