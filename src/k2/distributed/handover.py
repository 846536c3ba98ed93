"""Training and inference take turns on the same workers: who does not work gives its memory away.

What is in it waits elsewhere meanwhile: on a GPU in pinned memory of the host, on a CPU in a file.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

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
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        waiting = []
        for number, storage in enumerate(storages.values()):
            size = storage.nbytes()
            place = _place(storage.device, size, Path(scratch) / str(number))
            place.copy_(_bytes(storage), non_blocking=True)
            waiting.append((storage, place, size))
        _settle()
        for storage, _, _ in waiting:
            storage.resize_(0)
        try:
            yield sum(size for _, _, size in waiting)
        finally:
            for storage, place, size in waiting:
                storage.resize_(size)
                _bytes(storage).copy_(place, non_blocking=True)
            _settle()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _place(device: torch.device, size: int, path: Path) -> Tensor:
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return (
        torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        if size
        else torch.empty(0, dtype=torch.uint8)
    )


def _settle() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
