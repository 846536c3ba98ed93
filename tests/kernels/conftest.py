"""Kernels run in Triton's interpreter here, which must be chosen before Triton's Python part is imported."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
for name in [name for name in sys.modules if name.startswith(("triton", "k2.kernels")) and "._C" not in name]:
    del sys.modules[name]  # another test's import of torch or transformers may have brought it, to be compiled


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test draws the same numbers in any order, none compares a reference with itself, or chooses for others."""
    from k2.kernels import runtime
    from k2.model.backend import use_kernels

    assert runtime.INTERPRETING
    torch.manual_seed(0)
    yield
    use_kernels("auto")
