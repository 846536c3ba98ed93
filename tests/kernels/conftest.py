"""Kernels run in Triton's interpreter here; the switch must be set before Triton is imported."""

import os
import sys

import pytest
import torch

INTERPRETER = {"TRITON_INTERPRET": "1"}

if "triton" not in sys.modules:
    os.environ.update(INTERPRETER)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in any order."""
    torch.manual_seed(0)
