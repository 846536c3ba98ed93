"""What a step takes in memory, measured: every block that torch's allocator gives out and takes back, and when.

On a CPU what is offloaded comes from the same allocator; blocks that hold it are told by their addresses.
"""

from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from k2.config.pretrain import PretrainConfig
from k2.model.transformer import Transformer
from k2.training.batches import NextTokenLoss, TokenBatch
from k2.training.loop import Loss
from k2.training.pretraining import build
from k2.training.state import TrainState

T = TypeVar("T")
MARK, GRADIENT = "k2: ", "loss's gradient"


@dataclass(frozen=True)
class Footprint:
    """Bytes where it is computed; `host` what was offloaded.

    activations: what one micro-batch leaves for its backward pass, the loss's part included.
    optimizer: its states, measured before its first step.
    peaks: the most that gradients and activations take in each part of a step.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    host: int
    peaks: dict[str, int]

    @property
    def peak(self) -> str:
        """The part of a step that takes most."""
        return max(self.peaks, key=lambda part: self.peaks[part])

    @property
    def total(self) -> int:
        """The peak of a step."""
        return self.parameters + self.optimizer + self.peaks[self.peak]


@dataclass(frozen=True)
class Block:
    """Memory from one time to another, in nanoseconds."""

    start: int
    end: float
    address: int
    bytes: int


class Recording:
    """Blocks that work allocated, and the marks that it set."""

    def __init__(self, profiled: Any) -> None:
        results = profiled.profiler.kineto_results
        named = ((event.start_ns(), event.name()) for event in results.events())
        self.marks = [(start, name.removeprefix(MARK)) for start, name in sorted(named) if name.startswith(MARK)]
        self.blocks = list(_blocks(results.experimental_event_tree()))

    def alive(self, time: float) -> list[Block]:
        """What is allocated at a time."""
        return [block for block in self.blocks if block.start < time <= block.end]

    def peaks(self, ignored: set[Block]) -> dict[str, int]:
        """The most bytes at once after each mark, until the next one; of equal marks the most of all."""
        found, times = dict[str, int](), [start for start, _ in self.marks]
        counted = [block for block in self.blocks if block not in ignored]
        changes = [(b.start, b.bytes) for b in counted] + [(b.end, -b.bytes) for b in counted if b.end < inf]
        changes.sort()
        for (time, _), level in zip(changes, accumulate(size for _, size in changes), strict=True):
            part = self.marks[max(0, bisect(times, time) - 1)][1]
            found[part] = max(found.get(part, 0), level)
        return found


def _blocks(roots: Any) -> Iterator[Block]:
    waiting, changes = list(roots), []
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    given: dict[int, tuple[int, int]] = {}
    for time, address, size in sorted(changes):
        if size > 0:
            given[address] = (time, size)
        elif address in given:  # what was there before is not counted
            start, taken = given.pop(address)
            yield Block(start, time, address, taken)
    for address, (start, taken) in given.items():
        yield Block(start, inf, address, taken)


def recorded(work: Callable[[], T]) -> tuple[T, Recording]:
    """What work returns, and its allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    return result, Recording(profiled)


def mark(name: str, *_: object) -> None:
    """Say what begins here."""
    with record_function(MARK + name):
        pass


@contextmanager
def marked(model: Transformer) -> Iterator[None]:
    """Every layer marks the beginning of its forward and of its backward pass."""

    def before(number: str, _: object, inputs: tuple[Tensor, ...]) -> None:
        mark(f"forward of layer {number}")
        if number == first and inputs[0].requires_grad:
            inputs[0].register_hook(partial(mark, "embedding's gradient"))  # type: ignore[no-untyped-call]

    def after(number: str, _: object, __: object, outputs: tuple[Tensor, ...]) -> None:
        mark("loss")
        if outputs[0].requires_grad:
            outputs[0].register_hook(partial(mark, f"backward of layer {number}"))  # type: ignore[no-untyped-call]

    first = next(iter(model.layers))
    hooks = [
        hook
        for number, layer in model.layers.items()
        for hook in (
            layer.register_forward_pre_hook(partial(before, number)),
            layer.register_forward_hook(partial(after, number)),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(config: PretrainConfig, tokens: int, *, update: bool = True) -> Footprint:
    """Build a run and make a step of random tokens. Without `update` the optimizer does nothing."""
    (state, _), building = recorded(lambda: build(config))
    batch = random_batch(config, tokens)
    with marked(state.model):
        hosts, running = recorded(lambda: take_step(state, config, batch, update=update))
    times = [start for start, name in running.marks if name == GRADIENT]
    hosted = {
        block for time, host in zip(times, hosts, strict=True) for block in running.alive(time) if block.address in host
    }
    kept = running.alive(times[-1])
    parameters = list(state.model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    sizes = sum(parameter.nbytes for parameter in parameters)
    return Footprint(
        parameters=sizes,
        gradients=gradients,
        optimizer=sum(block.bytes for block in building.alive(inf)) - sizes,
        activations=sum(block.bytes for block in kept if block.end < inf and block not in hosted),
        host=sum(block.bytes for block in kept if block in hosted),
        peaks=running.peaks(hosted),
    )


def take_step(state: TrainState, config: PretrainConfig, batch: TokenBatch, *, update: bool) -> list[frozenset[int]]:
    """Two micro-batches: of one step, or of a step each where one is all that a step has.

    Either way the second finds what the first has left, gradients or their memory. Returns where on the host each left
    its activations.
    """
    hosts = []
    for _ in range(2):
        if batch.tokens == config.batch_tokens:
            state.model.zero_grad()
        hosts.append(_pass(state, config, batch))
    mark("optimizer")
    if update:
        state.optimizer.step()
    return hosts


def _pass(state: TrainState, config: PretrainConfig, batch: TokenBatch) -> frozenset[int]:
    """Forward and backward; where on the host activations were in between."""
    mark("embedding")
    loss: Loss = NextTokenLoss(config.balance_loss_weight)(state.model, batch)
    host = frozenset[int]() if state.model.offload is None else state.model.offload.addresses()
    mark(GRADIENT)
    loss.total.backward()  # type: ignore[no-untyped-call]
    return host


def tracked(config: PretrainConfig, tokens: int) -> int:
    """The peak of a step of two micro-batches by torch's MemTracker; the optimizer's workspace added."""
    (state, _), building = recorded(lambda: build(config))
    batch, tracker = random_batch(config, tokens), MemTracker()
    with tracker:
        tracker.track_external(state.model)  # what else the run was built of is not the tracker's to find
        for _ in range(2):
            tracker.reset_mod_stats()  # it takes one pass at a time
            _pass(state, config, batch)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    parameters = sum(parameter.nbytes for parameter in state.model.parameters())
    return sum(block.bytes for block in building.alive(inf)) - parameters + peak["Total"]


def random_batch(config: PretrainConfig, tokens: int) -> TokenBatch:
    """Rows of random tokens, so many in all."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = tokens // config.context_length, config.context_length
    tokens_BL = torch.randint(config.model.vocab_size, shape, generator=generator)
    return TokenBatch(tokens_BL, tokens_BL, torch.zeros_like(tokens_BL) if config.mask_documents else None)
