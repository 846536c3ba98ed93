"""What a step takes in memory, measured: the allocator's own events, phase by phase.

A run in one process: its model, its optimizer, and two micro-batches; the second one finds gradients to add to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from k2.config.pretrain import PretrainConfig
from k2.training.batches import NextTokenLoss, TokenBatch
from k2.training.loop import Loss
from k2.training.pretraining import build

T = TypeVar("T")


@dataclass(frozen=True)
class Footprint:
    """Bytes where it is computed; `host` what was offloaded.

    activations: what one micro-batch leaves for its backward pass, the loss's part included.
    working: the most that the backward pass needs besides.
    optimizer: its states; it is measured before its first step.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    host: int

    @property
    def total(self) -> int:
        """The peak of a step's micro-batches."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working


def allocated(work: Callable[[], T]) -> tuple[T, int, int]:
    """What work returns, the bytes it leaves allocated, and the most that it had allocated meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    levels = list(accumulate((size for _, size in changes), initial=0))
    return result, levels[-1], max(levels)


def measure(config: PretrainConfig, tokens: int) -> Footprint:
    """Build a run and pass two micro-batches of so many random tokens through it."""
    (state, _), states, _ = allocated(lambda: build(config))
    generator = torch.Generator().manual_seed(config.seed)
    shape = tokens // config.context_length, config.context_length
    tokens_BL = torch.randint(config.model.vocab_size, shape, generator=generator)
    batch, loss_fn = TokenBatch(tokens_BL, tokens_BL), NextTokenLoss(config.balance_loss_weight)

    def forward() -> Loss:
        return loss_fn(state.model, batch)

    forward().total.backward()  # type: ignore[no-untyped-call]
    loss, kept, _ = allocated(forward)
    offload = state.model.offload
    host = 0 if offload is None else offload.nbytes
    _, _, peak = allocated(loss.total.backward)
    sizes = [parameter.nbytes for parameter in state.model.parameters()]
    gradients = [parameter.grad.nbytes for parameter in state.model.parameters() if parameter.grad is not None]
    return Footprint(
        parameters=sum(sizes),
        gradients=sum(gradients),
        optimizer=states - sum(sizes),
        activations=kept - host,
        working=peak,
        host=host,
    )
