"""Training and inference take turns on the same workers: who does not work gives its memory away.

What is in it waits elsewhere meanwhile: on a GPU in pinned memory of the host, on a CPU in a file.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from k2.distributed.pieces import bytes_of, storages_of
from k2.training.state import TrainState


def memory_of(state: TrainState) -> list[Tensor]:
    """Everything that a training run holds between steps: weights, gradients, and all that the optimizer keeps."""
    held = list(state.model.parameters()) + list(state.model.buffers()) + list(state.optimizer.state_dict().values())
    return [tensor.detach() for tensor in held] + [p.grad for p in state.model.parameters() if p.grad is not None]


@contextmanager
def lent(tensors: Iterable[Tensor], folder: Path | None = None) -> Iterator[int]:
    """Free the memory of some tensors, and give it back with the same values; yields the bytes that became free.

    The tensors keep their identity, so that modules and optimizers need not know. Nobody may use them meanwhile.

    Args:
        folder: where values of CPU tensors wait; by default the system's temporary folder.
    """
    storages = storages_of(tensors)
    sizes = [storage.nbytes() for storage in storages]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fetch = [_put_away(storage, Path(scratch) / str(number)) for number, storage in enumerate(storages)]
        _settle()
        for storage in storages:
            storage.resize_(0)
        try:
            yield sum(sizes)
        finally:
            for storage, size, back in zip(storages, sizes, fetch, strict=True):
                storage.resize_(size)
                back()
            _settle()


class Temporary:
    """Memory of tensors whose values need not be kept: it is theirs inside of `with` only, with any values."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._memory = [(storage, storage.nbytes()) for storage in storages_of(tensors)]
        self._free()

    def __enter__(self) -> None:
        for storage, size in self._memory:
            storage.resize_(size)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._free()

    def _free(self) -> None:
        for storage, _ in self._memory:
            storage.resize_(0)


def _put_away(storage: torch.UntypedStorage, path: Path) -> Callable[[], object]:
    """Keep a copy of a storage's bytes; returns what brings them back."""
    size = storage.nbytes()
    if storage.device.type == "cpu":
        _mapped(path, size).copy_(bytes_of(storage))
        return lambda: bytes_of(storage).copy_(_mapped(path, size))
    place = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    place.copy_(bytes_of(storage), non_blocking=True)
    return lambda: bytes_of(storage).copy_(place, non_blocking=True)


def _mapped(path: Path, size: int) -> Tensor:
    """A file's bytes; in this process's memory as long as the tensor is."""
    empty = torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) if size else empty


def _settle() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
