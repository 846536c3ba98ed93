"""The committed table of registers, spills, shared memory and tensor-core instructions.

Machine code is made in another process: this one interprets kernels.
"""

import os
import subprocess
import sys

from k2.kernels.budgets import committed, faults


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "k2.kernels.budgets", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_no_row_is_out_of_date() -> None:
    result = run("--stale")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_compiling_for_sm_90_gives_the_committed_rows() -> None:
    result = run("--check", "--arch", "90")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_no_spills_on_sm_90_and_tensor_cores_everywhere() -> None:
    assert faults(committed()) == []
