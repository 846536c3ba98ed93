"""Immutable artifacts: files under an attempt, one manifest as the only commit point, verified reads.

<kind>/<key>/<attempt>/<path>      the files
<kind>/<key>/manifest.json         written last, with If-None-Match
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from k2.errors import StageError
from k2.store.client import ConflictError, Store
from k2.store.work import WorkArea

SCHEMA_VERSION = 1
"""Part of every key, and in every manifest: raise it when the layout of artifacts changes. Older ones are read."""

FULL_CHECK_BYTES = 256 * 1024 * 1024
"""A cache hit up to this size is read back and hashed; a larger one is checked by size and ETag."""


class CorruptArtifactError(StageError):
    """Stored bytes are not what the manifest says."""


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    sha256: str
    etag: str


class Manifest(BaseModel):
    """What an artifact is: its files, what is worth knowing about them, and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    kind: str
    key: str
    attempt: str
    files: tuple[FileEntry, ...]
    statistics: dict[str, Any] = {}
    provenance: dict[str, Any] = {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the sorted (path, size, sha256) of the files: equal content, equal digest."""
        rows = sorted((entry.path, entry.size, entry.sha256) for entry in self.files)
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


def cache_directory() -> Path:
    """Where verified local copies live: `$K2_HOME/cache`, by default `.k2/cache`."""
    return Path(os.environ.get("K2_HOME", ".k2")).absolute() / "cache"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A published artifact. Reading a file verifies it and keeps a local copy under its content digest."""

    store: Store
    manifest: Manifest
    _verified: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def kind(self) -> str:
        """The stage that made it."""
        return self.manifest.kind

    @property
    def key(self) -> str:
        """SHA-256 of what it was made from."""
        return self.manifest.key

    @property
    def digest(self) -> str:
        """SHA-256 of what it holds."""
        return self.manifest.digest

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix/kind/key`."""
        return self.store.url(f"{self.kind}/{self.key}")

    @property
    def statistics(self) -> Mapping[str, Any]:
        """What the stage said about it when it published."""
        return self.manifest.statistics

    @property
    def files(self) -> list[str]:
        """Sorted relative paths of its files."""
        return sorted(entry.path for entry in self.manifest.files)

    def path(self, name: str) -> Path:
        """A verified local copy of one file.

        Raises:
            CorruptArtifactError: the stored bytes differ from the manifest.
            KeyError: the artifact has no such file.
        """
        entry = self._entry(name)
        local = cache_directory() / self.digest / name
        if name not in self._verified:
            if not (local.exists() and file_sha256(local) == entry.sha256):
                self._fetch(entry, local)
            self._verified.add(name)
        return local

    def read(self, name: str) -> bytes:
        """The verified bytes of one file; no local copy stays.

        Raises:
            CorruptArtifactError: the stored bytes are missing or differ from the manifest.
            KeyError: the artifact has no such file.
        """
        entry = self._entry(name)
        data = self.store.get(self._object(entry))
        found = "nothing" if data is None else hashlib.sha256(data).hexdigest()
        if data is None or found != entry.sha256:
            raise self._corrupt(entry, found)
        return data

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of one file as they are stored: who reads them must know digests of parts.

        Raises:
            KeyError: the artifact has no such file.
        """
        return self.store.get_range(self._object(self._entry(name)), start, length)

    def directory(self) -> Path:
        """A local folder with verified copies of all files."""
        for name in self.files:
            self.path(name)
        return cache_directory() / self.digest

    def json(self, name: str) -> Any:
        """The parsed content of a JSON file."""
        return json.loads(self.path(name).read_bytes())

    def intact(self) -> bool:
        """Whether the store still holds what the manifest says (read back in full up to `FULL_CHECK_BYTES`)."""
        if self.manifest.size <= FULL_CHECK_BYTES:
            return all(self._stored_sha256(entry) == entry.sha256 for entry in self.manifest.files)
        infos = (self.store.stat(self._object(entry)) for entry in self.manifest.files)
        pairs = zip(infos, self.manifest.files, strict=True)
        return all(info is not None and (info.size, info.etag) == (e.size, e.etag) for info, e in pairs)

    def _stored_sha256(self, entry: FileEntry) -> str | None:
        data = self.store.get(self._object(entry))
        return None if data is None else hashlib.sha256(data).hexdigest()

    def _entry(self, name: str) -> FileEntry:
        entry = next((e for e in self.manifest.files if e.path == name), None)
        if entry is None:
            raise KeyError(f"{self.uri} has no file {name!r}; it has {', '.join(self.files)}")
        return entry

    def _corrupt(self, entry: FileEntry, found: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"{self.uri}/{entry.path} is corrupt: sha256 {found[:12]}…, the manifest says"
            f" {entry.sha256[:12]}…; run again and it is made anew"
        )

    def _object(self, entry: FileEntry) -> str:
        return f"{self.kind}/{self.key}/{self.manifest.attempt}/{entry.path}"

    def _fetch(self, entry: FileEntry, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.with_name(f".{local.name}.{uuid.uuid4().hex}")
        try:
            self.store.download(self._object(entry), part)
            found = file_sha256(part)
            if found != entry.sha256:
                raise self._corrupt(entry, found)
            part.replace(local)
        finally:
            part.unlink(missing_ok=True)


def find(store: Store, kind: str, key: str) -> Artifact | None:
    """The artifact published under a key, or None. Its bytes are not checked.

    Raises:
        StageError: a newer K2 published it, in a layout that this one does not know.
    """
    data = store.get(f"{kind}/{key}/manifest.json")
    manifest = None if data is None else read_manifest(data, store.url(f"{kind}/{key}"))
    return None if manifest is None else Artifact(store, manifest)


def read_manifest(data: bytes, uri: str) -> Manifest | None:
    """The manifest in some bytes, or None when they are torn.

    Raises:
        StageError: its schema is newer than `SCHEMA_VERSION`.
    """
    try:
        found = json.loads(data)
        version = found.get("schema_version", 1)
        if version > SCHEMA_VERSION:
            raise StageError(
                f"{uri}: artifact schema {version} is of a newer K2, this one reads up to {SCHEMA_VERSION};"
                " upgrade K2 here (docs/compatibility.md)"
            )
        return Manifest.model_validate(found)
    except (ValueError, TypeError, AttributeError):
        return None


def open_uri(store: Store, uri: str) -> Artifact:
    """The artifact behind a URI as `Artifact.uri` prints it.

    Raises:
        StageError: nothing is published there.
    """
    kind, _, key = store.name(uri).partition("/")
    artifact = find(store, kind, key.strip("/"))
    if artifact is None:
        raise StageError(f"{uri}: no artifact is published there")
    return artifact


def finite(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics as JSON can hold them: numbers that are not finite become text, and `nonfinite` names their places."""
    made = {name: _finite(value) for name, value in statistics.items()}
    changed = sorted(name for name, value in statistics.items() if made[name] != value)
    return made | ({"nonfinite": changed} if changed else {})


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return type(value)(map(_finite, value)) if isinstance(value, (list, tuple)) else value


class ArtifactWriter:
    """Collects a stage's output files in a scratch folder and publishes them at the end."""

    def __init__(
        self,
        store: Store,
        kind: str,
        key: str,
        work: WorkArea,
        provenance: Mapping[str, Any] | None = None,
        replaces: str | None = None,
    ) -> None:
        """`replaces` is the ETag of a manifest whose files were found missing or corrupt."""
        self.store, self.kind, self.key, self.work, self._replaces = store, kind, key, work, replaces
        self._provenance = dict(provenance or {})
        self.attempt = uuid.uuid4().hex[:12]
        self._scratch = Path(tempfile.mkdtemp(prefix=f"k2-{kind}-", dir=os.environ.get("K2_SCRATCH")))

    def path(self, name: str) -> Path:
        """Where to write an output file; its folders exist."""
        path = self._scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def upload(self, attempt: str) -> list[FileEntry]:
        """Upload and verify what was written; nobody sees it before a manifest of that attempt lists it."""
        names = sorted(str(p.relative_to(self._scratch)) for p in self._scratch.rglob("*") if p.is_file())
        return [self._upload(name, attempt) for name in names]

    def publish(self, others: Sequence[FileEntry] = (), /, **statistics: Any) -> Artifact:
        """Upload, verify, then commit the manifest; whoever published first wins and is returned.

        `others` are files that other writers uploaded for this one's attempt.

        Raises:
            ConflictError: the lease on this key was lost meanwhile.
        """
        self.work.lease.assert_held()
        entries = sorted([*self.upload(self.attempt), *others], key=lambda entry: entry.path)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind=self.kind,
            key=self.key,
            attempt=self.attempt,
            files=tuple(entries),
            statistics=finite(statistics),
            provenance=self._provenance,
        )
        return self._commit(manifest)

    def discard(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _upload(self, name: str, attempt: str) -> FileEntry:
        path = self._scratch / name
        info = self.store.upload(path, f"{self.kind}/{self.key}/{attempt}/{name}")
        return FileEntry(path=name, size=info.size, sha256=file_sha256(path), etag=info.etag)

    def _commit(self, manifest: Manifest) -> Artifact:
        name = f"{self.kind}/{self.key}/manifest.json"
        body = manifest.model_dump_json(indent=1).encode()
        try:
            self.store.put(name, body, if_none_match=self._replaces is None, if_match=self._replaces)
        except ConflictError:
            winner = find(self.store, self.kind, self.key)
            if winner is None:
                raise
            return winner
        return Artifact(self.store, manifest)
