"""Temporary files of runs: gone at the end, and after a kill with the next run."""

import subprocess
import sys
from pathlib import Path

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
