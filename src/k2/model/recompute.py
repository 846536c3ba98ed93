"""Selective recomputation: what is cheap to compute again is not kept for the backward pass (K2 report, section 2.4).

An operation called through `Recomputation.call` leaves its inputs behind instead of its outputs: whatever autograd
would keep of the outputs is replaced by a recipe. The numbers are the same to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[..., Any]


def plain_call(operation: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
    """The operation, its outputs kept as autograd likes."""
    return operation(*inputs)


class _Recipe:
    """An operation and its kept inputs; computes the outputs once for all that would have kept them."""

    def __init__(self, operation: Callable[..., Outputs], inputs: list[Any]) -> None:
        self.operation, self.inputs = operation, inputs
        self.users = self.served = 0
        self.outputs: tuple[Tensor, ...] = ()

    def output(self, number: int) -> Tensor:
        if not self.served:
            with torch.no_grad():
                self.outputs = _as_tuple(self.operation(*(_unpack(kept) for kept in self.inputs)))
        result = self.outputs[number]
        self.served += 1
        if self.served == self.users:
            self.served, self.outputs = 0, ()
        return result


class Recomputation:
    """Entered around the forward pass of a layer; `call` runs an operation whose outputs are not kept."""

    def __init__(self) -> None:
        # Outputs by their storage, held so that no other tensor gets it before the layer is done.
        self._known: dict[int, tuple[Tensor, _Recipe, int]] = {}
        self._hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> None:
        self._hooks.append(saved_tensors_hooks(self._pack, _unpack))
        self._hooks[-1].__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.pop().__exit__(*error)
        self._known.clear()

    def call(self, operation: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
        """The operation; outside of the layer, or without gradients, nothing else."""
        outputs = operation(*inputs)
        if self._hooks and torch.is_grad_enabled():
            recipe = _Recipe(operation, [self._pack(tensor.detach()) for tensor in inputs])
            for number, output in enumerate(_as_tuple(outputs)):
                self._known[_storage(output)] = (output.detach(), recipe, number)
        return outputs

    def _pack(self, tensor: Tensor) -> Any:
        _, recipe, number = self._known.get(_storage(tensor), (None, None, 0))
        if recipe is None:
            return tensor
        recipe.users += 1
        return recipe, number, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, number, shape, stride, offset = kept
    result: Tensor = recipe.output(number).as_strided(shape, stride, offset)
    return result


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _storage(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity
