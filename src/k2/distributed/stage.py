"""A stage of torch's pipeline that receives into memory which is there only while a micro-batch is in flight.

Torch has a buffer for the hidden states of every micro-batch of a step, and one for their gradients: of a thousand
micro-batches that would be more than everything else. Torch has no public way to say when, so two private methods and
the attributes `args_recv_info` and `grad_recv_info` are relied upon; tests/distributed/test_stage.py tells when another
version of torch has them otherwise.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import P2POp
from torch.distributed.pipelining import PipelineStage


class Stage(PipelineStage):
    """Buffers are on the meta device until they are received into, and again once they are used."""

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._nowhere():
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._nowhere():
            super()._setup_backward_recv_info(num_microbatches)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """Torch's, into new memory."""
        _place(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """Torch's, into new memory."""
        _place(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Torch's; what was received is left to the backward pass."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _place(self.args_recv_info[fwd_chunk_id], torch.device("meta"))
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Torch's; what was received is set free."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _place(self.grad_recv_info.get(bwd_chunk_id, ()), torch.device("meta"))

    @contextmanager
    def _nowhere(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device


def _place(infos: Iterable[Any], device: torch.device) -> None:
    """Give every buffer new memory on a device."""
    for info in infos:
        if info.buffer is not None:
            info.buffer = torch.empty_like(info.buffer, device=device, requires_grad=False)
