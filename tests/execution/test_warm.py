"""Warm starts: a step sees what an interpreter started in its place would see, and dies with the run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.execution.warm import warm_starts
from k2.processes import ROOT_VARIABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm starts need Linux")
STEP = """
import os, sys
import torch
print(sys.argv[1:], os.getcwd(), os.environ.get("K2_TEST_WORD"), sys.stdin.read(), __name__)
print(os.getpid(), flush=True)
print("to stderr", file=sys.stderr)
if sys.argv[1] == "raise":
    raise ValueError("a defect")
if sys.argv[1] == "wait":
    import time; time.sleep(60)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = (tmp_path_factory.mktemp("warm") / "log").open("wb")
    with log, warm_starts(os.environ | {ROOT_VARIABLE: str(os.getpid())}, log) as python:
        yield python


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "warm_step.py").write_text(STEP)
    return tmp_path


def start(python: str, site: Path, argument: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [python, "-m", "warm_step", argument, "two words"],
        cwd=site,
        env=os.environ | {"K2_TEST_WORD": "ünï", "PYTHONPATH": str(site)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("argument", "code"), [("0", 0), ("2", 2), ("raise", 1), ("killed", 128 + signal.SIGKILL)])
def test_a_step_has_arguments_streams_environment_and_exit_code(
    python: str, site: Path, argument: str, code: int
) -> None:
    process = start(python, site, argument)
    out, err = process.communicate("from stdin")
    assert process.returncode == code
    assert out.splitlines()[0] == f"['{argument}', 'two words'] {site} ünï from stdin __main__"
    assert err.startswith("to stderr")
    assert ("ValueError: a defect" in err) == (argument == "raise")


def test_steps_are_processes_of_their_own_and_run_side_by_side(python: str, site: Path) -> None:
    steps = [start(python, site, "0") for _ in range(3)]
    pids = {step.communicate("")[0].splitlines()[1] for step in steps}
    assert len(pids) == 3


def test_a_step_ends_with_the_server(site: Path) -> None:
    with Path(os.devnull).open("wb") as log, warm_starts(os.environ | {ROOT_VARIABLE: str(os.getpid())}, log) as python:
        process = start(python, site, "wait")
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.close()
        stdout.readline()
        assert process.poll() is None
    process.stdin = None
    process.communicate(timeout=10)  # returns when the step is gone, for it holds the other ends
    assert process.returncode == 1
