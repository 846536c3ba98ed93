"""What a layer leaves behind for its backward pass, and in which form (Kimi K2 report, section 2.4).

An output is computed again instead of kept (`call`), a tensor is kept as FP8 (`compress`), and what is left waits on
the host (`Offload`). Tensors that share memory are one: whoever would keep any of them gets it back from one source.
Recomputation and offloading change no bit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from k2.kernels import fp8_reference
from k2.model.backend import kernels_for
from k2.model.offload import Group, Offload

Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[..., Any]
Keep = Callable[[Tensor], Tensor | None]
"""What to leave behind of a tensor: it, or nothing; it may be marked to be kept in another form."""


def plain_call(operation: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
    """The operation, its outputs kept as autograd likes."""
    return operation(*inputs)


def keep_it(tensor: Tensor) -> Tensor:
    """Leave the tensor behind as it is."""
    return tensor


def drop_it(tensor: Tensor) -> None:
    """Leave nothing behind."""


class _Source:
    """Makes tensors once for all that would have kept them."""

    def __init__(self, make: Callable[[], Outputs]) -> None:
        self._make = make
        self.users = self._served = 0
        self._outputs: tuple[Tensor, ...] = ()

    def output(self, number: int) -> Tensor:
        if not self._served:
            with torch.no_grad():
                self._outputs = _as_tuple(self._make())
        result = self._outputs[number]
        self._served += 1
        if self._served == self.users:
            self._served, self._outputs = 0, ()
        return result


class _View:
    """A tensor as it lies in the memory of a source's output."""

    def __init__(self, source: _Source, number: int, tensor: Tensor) -> None:
        source.users += 1
        self._source, self._number, self._dtype = source, number, tensor.dtype
        self._place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        return self._source.output(self._number).view(self._dtype).as_strided(*self._place)


class Activations:
    """Says what becomes of the tensors that autograd keeps in a layer.

    Args:
        offload: where the tensors go that are neither computed again nor weights; None leaves them as they are.
        before: those of the layer before, which the backward pass needs next.
    """

    def __init__(self, offload: Offload | None = None, before: "Activations | None" = None) -> None:
        # Sources by the storage they stand for, held so that no other tensor gets it before the layer is done.
        self._known: dict[int, tuple[Tensor, _Source, int]] = {}
        self._offload, self._before = offload, before
        self._fixed: set[int] = set()
        self._group: Group | None = None
        self._active = False

    @contextmanager
    def around(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """Holds for a forward pass of the layer with these weights, which stay where they are."""
        if self._offload is not None:
            self._fixed = {_storage(weight) for weight in weights}
            self._group = Group(None if self._before is None else self._before._group)
        self._active = torch.is_grad_enabled()
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._active = False
            self._known.clear()

    def call(self, operation: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
        """The operation; its outputs are computed again in the backward pass. Outside of the layer nothing else."""
        outputs = operation(*inputs)
        if self._active:
            self._replace(_as_tuple(outputs), operation, inputs)
        return outputs

    def compress(self, tensor: Tensor) -> Tensor:
        """The tensor; unless it is computed again anyway, it is kept as FP8 E4M3, a scale for 128 values of a row."""
        if self._active and _storage(tensor) not in self._known:
            fp8 = kernels_for(tensor, elementwise=True) or fp8_reference
            code_ND, scale_NG = fp8.quantize(tensor.detach().contiguous().flatten(0, -2))
            self._replace((tensor,), partial(fp8.dequantize, dtype=tensor.dtype), (code_ND, scale_NG))
        return tensor

    def _replace(self, outputs: Iterable[Tensor], operation: Callable[..., Outputs], inputs: Iterable[Tensor]) -> None:
        kept = [self._pack(tensor.detach()) for tensor in inputs]
        source = _Source(lambda: operation(*(_unpack(each) for each in kept)))
        for number, output in enumerate(outputs):
            self._known[_storage(output)] = (output.detach(), source, number)

    def _pack(self, tensor: Tensor) -> Any:
        storage = _storage(tensor)
        if storage not in self._known:
            if self._offload is None or self._group is None or storage in self._fixed:
                return tensor
            source = _Source(self._offload.take(tensor, self._group))
            self._known[storage] = (tensor.detach(), source, 0)
        _, source, number = self._known[storage]
        return _View(source, number, tensor)


def _unpack(kept: Any) -> Tensor:
    return kept.tensor() if isinstance(kept, _View) else kept


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _storage(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity
