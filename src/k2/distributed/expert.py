"""Expert parallelism: every rank holds some experts, and tokens travel to their experts and back.

Both ways are one all-to-all of as many rows as the router sent; nothing is padded and no token dropped. On the way
there, and on the gradients' way back, the shared expert is computed.

Letters in shapes: T tokens, S choices per token, E experts of one rank, P ranks, D hidden,
N rows that leave this rank (T x S), M rows that arrive.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.distributed.watchdog import collective
from k2.model.experts import arrange
from k2.model.moe import Experts, MixtureOfExperts, Routing


class Flight:
    """Rows [., D] on their way: an all-to-all that runs while something else is computed."""

    def __init__(self, rows: Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup) -> None:
        """Send off; the numbers of rows are by rank."""
        self._leaving = rows.contiguous()  # held until they have arrived
        self.rows = rows.new_empty(sum(arriving), rows.shape[1])
        self._work = dist.all_to_all_single(self.rows, self._leaving, arriving, leaving, group=group, async_op=True)

    def land(self) -> Tensor:
        """The rows, once all are there."""
        with collective("tokens to and from their experts", [self._leaving, self.rows]):
            self._work.wait()
        return self.rows


@dataclass(frozen=True)
class Exchange:
    """Where rows go: row n of those that leave is item `source_N[n]`, and item t sums the rows `slots_TS[t]`.

    sent, received: rows for and from each rank, in rank order.
    """

    group: dist.ProcessGroup
    source_N: Tensor
    slots_TS: Tensor
    sent: list[int]
    received: list[int]

    def there(self, items_TD: Tensor) -> Flight:
        """[T, D] -> [M, D]: from items to the rows that the other ranks sent here."""
        return Flight(items_TD.index_select(0, self.source_N), self.sent, self.received, self.group)

    def back(self, rows_MD: Tensor) -> Flight:
        """[M, D] -> [N, D]: rows return to where they came from."""
        return Flight(rows_MD, self.received, self.sent, self.group)

    def total(self, rows_ND: Tensor) -> Tensor:
        """[N, D] -> [T, D]: the sum of every item's rows, in a fixed order. `back` and `total` transpose `there`."""
        return F.embedding_bag(self.slots_TS, rows_ND, mode="sum")


class Journey:
    """Items to the other ranks, asynchronously both ways: what autograd finds between `_Depart` and `_Arrive`
    runs while rows travel forward, and its backward pass while their gradients travel back."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.flight: Flight | None = None

    def depart(self, items_TD: Tensor) -> Tensor:
        """Rows [M, D] that are not there before `arrive`."""
        result: Tensor = _Depart.apply(items_TD, self)  # type: ignore[no-untyped-call]
        return result

    def arrive(self, rows_MD: Tensor) -> Tensor:
        """The rows, to be used from here on."""
        result: Tensor = _Arrive.apply(rows_MD, self)  # type: ignore[no-untyped-call]
        return result

    def land(self) -> Tensor:
        """Wait for what is under way, and forget it: rows that autograd made must not stay within its reach."""
        flight, self.flight = self.flight, None
        assert flight is not None, "departs before it arrives"
        return flight.land()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items_TD: Tensor, journey: Journey) -> Tensor:
        ctx.journey, journey.flight = journey, journey.exchange.there(items_TD)
        return journey.flight.rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.exchange.total(ctx.journey.land()), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.land()
        return rows_MD.view_as(rows_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        # The gradient leaves from here; what is returned only tells autograd whose turn it is.
        ctx.journey.flight = ctx.journey.exchange.back(grad_MD)
        return grad_MD, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.total(exchange.back(rows_MD).land())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.there(grad_TD).land(), None


class ExpertParallel:
    """A `Dispatcher` over the ranks of a group; rank r holds the r-th equal part of the experts.

    A (token, choice) pair is one row, with its routing weight; experts of another rank see it as a token of one choice.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Callable[[], Tensor]:
        """Send tokens to their experts' ranks; the result computes what arrived here and sends it back."""
        rows, pairs_N = arrange(routing.experts_TS, routing.scores_TE.shape[1])
        sent_PE = rows.offsets.diff().view(self._group.size(), -1)
        received_PE = torch.empty_like(sent_PE)
        with collective("numbers of tokens", [sent_PE]):
            dist.all_to_all_single(received_PE, sent_PE, group=self._group)
        sizes = sent_PE.sum(1).tolist(), received_PE.sum(1).tolist()
        tokens = Journey(Exchange(self._group, rows.tokens_N, rows.slots_TS, *sizes))
        pairs = Journey(Exchange(self._group, pairs_N, rows.slots_TS.view(-1, 1), *sizes))
        x_MD, weights_M1 = tokens.depart(x_TD), pairs.depart(routing.weights_TS.reshape(-1, 1))
        numbers = torch.arange(sent_PE.shape[1], device=x_TD.device).repeat(len(sent_PE))
        chosen_M1 = numbers.repeat_interleave(received_PE.flatten())[:, None]

        def finish() -> Tensor:
            output_MD = experts(tokens.arrive(x_MD), chosen_M1, pairs.arrive(weights_M1))
            result: Tensor = _Collect.apply(output_MD, tokens.exchange)  # type: ignore[no-untyped-call]
            return result

        return finish


def local_experts(experts: int, group: dist.ProcessGroup) -> range:
    """The experts that this rank of the group holds."""
    part = experts // group.size()
    return range(group.rank() * part, (group.rank() + 1) * part)


def divide_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Keep this rank's part of every layer's experts, and let tokens travel to the others."""
    for mixture in (module for module in model.modules() if isinstance(module, MixtureOfExperts)):
        mixture.dispatch = ExpertParallel(group)
        for name, weight in list(mixture.experts.named_parameters()):
            mine = local_experts(len(weight), group)
            part = nn.Parameter(weight.detach()[mine.start : mine.stop].clone())
            part.grad_dtype = weight.grad_dtype
            setattr(mixture.experts, name, part)
