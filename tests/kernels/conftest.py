"""Kernels run in Triton's interpreter here; the switch must be set before Triton is imported."""

import os

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"

from k2.kernels import runtime


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in any order, and none compares a reference with itself."""
    assert runtime.INTERPRETING, "Triton was imported before tests/kernels/conftest.py could choose the interpreter"
    torch.manual_seed(0)
