"""Memory of weights' gradients, left by one step to the next.

The system clears fresh memory page by page when it is first touched: a tenth of a step's time with many experts.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_byte
from math import prod
from weakref import finalize

import torch
from torch import Tensor, UntypedStorage

SMALLEST = 2**18  # bytes; of less, malloc has some at hand

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
    memory = _spare[size].pop() if _spare[size] else UntypedStorage(size)  # type: ignore[no-untyped-call]
    seen = (c_byte * size).from_address(memory.data_ptr())  # a new object, which ends with the last tensor made of it
    finalize(seen, _ended, memory).atexit = False
    return torch.frombuffer(seen, dtype=dtype).view(sizes)


def _ended(memory: UntypedStorage) -> None:
    if _leaving:
        _spare[memory.nbytes()].append(memory)
