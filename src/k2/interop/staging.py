"""A folder that is written over a long time, survives kill -9, and becomes visible in one step when it is complete.

While it is written it is `.<out>.partial` beside the result, and `.<out>.journal` names what it was asked for and
which files are finished. Torch-free.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from k2.errors import UserError
from k2.interop.digests import FileDigest, digests, file_digest, read_request, verified, write_manifest


@dataclass
class Staging:
    """Files on their way to `out`; made by `staged`. `finished` holds digests of files that need no more work."""

    out: Path
    folder: Path
    journal: IO[str]
    request: Mapping[str, Any]
    finished: dict[str, FileDigest] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether a file was finished by an earlier run and is still what it was."""
        path = self.folder / name
        return name in self.finished and path.is_file() and file_digest(path) == self.finished[name]

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Where to write a file, which is recorded as finished afterwards; it must then be on disk."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        yield part
        part.replace(path)
        self.finished[name] = file_digest(path)
        _append(self.journal, {"file": name, **asdict(self.finished[name])})

    def publish(self) -> None:
        """Write the manifest last, bring everything to disk, and give the folder its name."""
        names = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        files = self.finished | digests(self.folder, names - self.finished.keys())
        write_manifest(self.folder, self.request, files)
        for path in (*self.folder.rglob("*"), self.folder):
            _sync(path)
        self.folder.replace(self.out)
        _sync(self.out.parent)


@contextmanager
def lock(out: Path) -> Iterator[IO[str]]:
    """The journal of what is being written to `out`, held by this process alone.

    After a UserError nothing is left behind. After anything else, a kill included, the work can be continued.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.journal")
    with path.open("a+") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing it") from None
        try:
            yield journal
        except UserError:
            shutil.rmtree(_partial(out), ignore_errors=True)
            path.unlink()
            raise
        path.unlink()


def complete(out: Path, request: Mapping[str, Any]) -> bool:
    """Whether `out` holds the result of this request already; its files are verified.

    Raises UserError when it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir() or read_request(out) != request:
        raise UserError(f"{out}: exists and is not empty; name a new folder")
    verified(out, [])
    return True


def staged(out: Path, journal: IO[str], request: Mapping[str, Any]) -> Staging:
    """What a killed run left if it was about the same request, else an empty folder."""
    folder = _partial(out)
    journal.seek(0)
    lines = journal.readlines()
    if not lines or _parse(lines[0]) != request:
        shutil.rmtree(folder, ignore_errors=True)
        lines = []
        journal.seek(0)
        journal.truncate()
        _append(journal, request)
    elif not lines[-1].endswith("\n"):
        journal.write("\n")
    folder.mkdir(exist_ok=True)
    entries = [entry for line in lines[1:] if (entry := _parse(line))]
    finished = {entry["file"]: FileDigest(entry["size"], entry["sha256"]) for entry in entries}
    return Staging(out, folder, journal, request, finished)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the journal, or None for one that was torn by a kill."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def _append(journal: IO[str], entry: Mapping[str, Any]) -> None:
    journal.write(json.dumps(entry, sort_keys=True) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
