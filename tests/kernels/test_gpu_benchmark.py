"""The GPU benchmark where there is no GPU: it says so, and its cases compute the same on both sides."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Sizes, cases, error
from k2.kernels.budgets import launches

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SMALL = Sizes(
    tokens=20, hidden=64, width=16, experts=12, local_experts=3, choices=2, heads=2, content=16, rotary=16,
    vocabulary=40,
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2():
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr


def test_every_case_runs_and_both_sides_agree():
    names = set()
    for case in cases(SMALL, "cpu", torch.float32):
        assert error(case) < 1e-3, case.claim
        for peer in list(case.peers.values())[1:]:
            case.run(peer)
        names |= set(case.launches)
    unmeasured = {launch.name for launch in launches()} - names
    assert unmeasured == {"symmetric.gram", "symmetric.square"}  # measured inside Newton-Schulz
