"""The committed table of registers, spills, shared memory and tensor-core instructions.

Machine code is made in another process: this one interprets kernels.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from k2.kernels import budgets
from k2.kernels.budgets import committed, faults, launches


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "k2.kernels.budgets", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_every_kernel_has_a_row() -> None:
    """A file's functions that Triton compiles and nothing else calls are launched, and so compiled."""
    folder = Path(budgets.__file__).parent
    written = {
        f"{path.stem}.{name}"
        for path in folder.glob("*.py")
        for name in re.findall(r"^@jit\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    modules = {launch.kernel.fn.__module__.rsplit(".", 1)[1] + f".{launch.kernel.fn.__name__}" for launch in launches()}
    assert modules == written
    assert {name.split()[0] for name in committed()} == {launch.name for launch in launches()}


def test_no_row_is_out_of_date() -> None:
    result = run("--stale")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_compiling_for_sm_90_gives_the_committed_rows() -> None:
    result = run("--check", "--arch", "90")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_no_spills_on_sm_90_and_tensor_cores_everywhere() -> None:
    assert faults(committed()) == []
