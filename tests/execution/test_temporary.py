"""Temporary files of runs: gone at the end, and after a kill with the next run."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.errors import UserError
from k2.execution.temporary import temporary_folder

HOLD = """
import sys, time
from pathlib import Path
from k2.execution.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    Path(folder, "file").write_text("of a step")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_it_is_gone_afterwards_with_all_that_is_in_it(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        Path(folder, "file").touch()
        assert [owner.resolve() for owner in (tmp_path / "temporary").iterdir()] == [Path(folder)]
    assert not Path(folder).exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_the_next_run_removes_that_of_a_killed_one_and_of_no_other(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        with temporary_folder(tmp_path):
            assert (folder / "file").read_text() == "of a step"
        other.kill()
        other.wait()
        assert (folder / "file").exists()
        with temporary_folder(tmp_path):
            assert not folder.exists()
    assert not list((tmp_path / "temporary").iterdir())


def parent(base: Path, length: int) -> str:
    """A folder whose path has so many characters."""
    folder = base / ("x" * (length - len(str(base)) - 1))
    folder.mkdir()
    return str(folder)


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="k2-", dir="/tmp") as folder:
        yield Path(folder)


def test_in_the_longest_folder_that_is_allowed_processes_share_objects(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", parent(short, 59))
    with temporary_folder(tmp_path) as folder:
        code = "import multiprocessing\nwith multiprocessing.Manager() as made: print(made.list([1]))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout == "[1]\n", done.stderr


def test_a_longer_one_is_refused_before_anything_is_made(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", long := parent(short, 60))
    expected = f"^TMPDIR: {long} has 60 bytes, but steps' sockets allow 59; set"
    with pytest.raises(UserError, match=expected), temporary_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    assert not list(Path(long).iterdir())
