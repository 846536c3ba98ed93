"""Activations on the host until the backward pass needs them (Kimi K2 report, section 2.4).

On a GPU copies run on a stream of their own, through pinned memory: what a layer leaves behind travels while the next
layer is computed, and comes back while the backward pass is in the layer after it. On a CPU they are plain copies.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet, ref

import torch
from torch import Tensor

Fetched = tuple[Tensor, torch.cuda.Event | None]
"""A tensor on its device, and what it is to be waited for."""


class SideStream:
    """Copies between a device and the host, one after the other and beside the computation where there are streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def leave(self, tensor: Tensor) -> Tensor:
        """A copy on the host, complete before it is fetched."""
        with self._aside():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
            host.copy_(tensor, non_blocking=True)
        if self._stream is not None:
            tensor.record_stream(self._stream)  # nobody gets this memory before it is copied
        return host

    def fetch(self, host: Tensor) -> Fetched:
        """Begin to copy it back."""
        with self._aside():
            tensor = torch.empty(host.shape, dtype=host.dtype, device=self._device)
            tensor.copy_(host, non_blocking=True)
        return tensor, None if self._stream is None else self._stream.record_event()

    def landed(self, fetched: Fetched) -> Tensor:
        """What was fetched, to be used from here on."""
        tensor, event = fetched
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            tensor.record_stream(current)
        return tensor

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream, after what has been computed so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # does nothing without a stream
            yield


class HostCopy:
    """The memory behind a tensor, on the host."""

    def __init__(self, tensor: Tensor, side: SideStream, group: "Group") -> None:
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self._side, self._group, self.host = side, group, side.leave(memory)
        self._fetched: Fetched | None = None
        group.copies.append(ref(self))

    def begin(self) -> None:
        """Begin to fetch it."""
        if self._fetched is None:
            self._fetched = self._side.fetch(self.host)

    def memory(self) -> Tensor:
        """All bytes, on the device; those who left it together, and before it, are fetched as well."""
        self._group.needed()
        self.begin()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None  # for the type: it was begun
        return self._side.landed(fetched)


class Group:
    """What one layer left on the host in one forward pass; `before` is what the layer before it left."""

    def __init__(self, before: "Group | None") -> None:
        self._before, self._begun = before, False
        self.copies: list[ref[HostCopy]] = []

    def needed(self) -> None:
        """The backward pass is here: fetch all of it, and what the backward pass needs next."""
        self._begin()
        if self._before is not None:
            self._before._begin()

    def _begin(self) -> None:
        """Last things first, which is the order of the backward pass; once."""
        for copy in () if self._begun else reversed(self.copies):
            if (alive := copy()) is not None:
                alive.begin()
        self._begun = True


class Offload:
    """Takes tensors to the host; one for all layers."""

    def __init__(self) -> None:
        self._sides: dict[torch.device, SideStream] = {}
        self._copies: WeakSet[HostCopy] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes on the host now."""
        return sum(copy.host.nbytes for copy in self._copies)

    def addresses(self) -> frozenset[int]:
        """Where on the host they are."""
        return frozenset(copy.host.data_ptr() for copy in self._copies)

    def take(self, tensor: Tensor, group: Group) -> Callable[[], Tensor]:
        """Copy the memory behind a tensor to the host; what is returned brings it back, as bytes."""
        if tensor.device not in self._sides:
            self._sides[tensor.device] = SideStream(tensor.device)
        copy = HostCopy(tensor, self._sides[tensor.device], group)
        self._copies.add(copy)
        return copy.memory
