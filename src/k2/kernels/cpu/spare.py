"""Memory of weights' gradients, left by one step to the next.

The system clears fresh memory page by page when it is first touched: a tenth of a step's time with many experts. Pages
of large gradients are large where Linux has such on request: fewer to clear, and to find again.
"""

import mmap
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_byte, c_int, c_size_t, c_void_p
from math import prod
from weakref import finalize

import torch
from torch import Tensor, UntypedStorage

SMALLEST = 2**18  # bytes; of less, malloc has some at hand
LARGE_PAGE = 2**21

_spare: defaultdict[int, list[UntypedStorage]] = defaultdict(list)
_leaving = False


@contextmanager
def left() -> Iterator[None]:
    """Gradients that end in here leave their memory to the next ones; what was left before and not taken is freed.

    A gradient ends when nobody has it or a view of it any more.
    """
    global _leaving
    _spare.clear()
    _leaving = True
    try:
        yield
    finally:
        _leaving = False


def empty(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a gradient, not cleared."""
    size = prod(sizes) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(sizes, dtype=dtype)
    memory = _spare[size].pop() if _spare[size] else _fresh(size)
    seen = (c_byte * size).from_address(memory.data_ptr())  # a new object, which ends with the last tensor made of it
    finalize(seen, _ended, memory).atexit = False
    return torch.frombuffer(seen, dtype=dtype).view(sizes)


def _fresh(size: int) -> UntypedStorage:
    memory = UntypedStorage(size)  # type: ignore[no-untyped-call]
    start, end = -(-memory.data_ptr() // LARGE_PAGE), (memory.data_ptr() + size) // LARGE_PAGE
    if start < end and sys.platform == "linux":
        advise = CDLL(None).madvise
        advise.argtypes = c_void_p, c_size_t, c_int
        advise(start * LARGE_PAGE, (end - start) * LARGE_PAGE, mmap.MADV_HUGEPAGE)  # a system without them ignores it
    return memory


def _ended(memory: UntypedStorage) -> None:
    if _leaving:
        _spare[memory.nbytes()].append(memory)
