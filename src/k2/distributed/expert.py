"""Expert parallelism: every rank holds some experts, and tokens travel to their experts and back.

Both journeys are one all-to-all of as many rows as the router sent; nothing is padded and no token dropped.

Letters in shapes: T tokens, S choices per token, E experts of one rank, P ranks, D hidden,
N rows that leave this rank (T x S), M rows that arrive.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.model.moe import Experts, MixtureOfExperts, Routing, arrange


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

    def scatter(self, items_TD: Tensor) -> Tensor:
        """[T, D] -> [M, D], the rows that the other ranks sent here."""
        rows_MD = items_TD.new_empty(sum(self.received), items_TD.shape[1])
        rows_ND = items_TD.index_select(0, self.source_N)
        dist.all_to_all_single(rows_MD, rows_ND, self.received, self.sent, group=self.group)
        return rows_MD

    def collect(self, rows_MD: Tensor) -> Tensor:
        """[M, D] -> [T, D], the transpose of `scatter`; sums have a fixed order."""
        rows_ND = rows_MD.new_empty(sum(self.sent), rows_MD.shape[1])
        dist.all_to_all_single(rows_ND, rows_MD.contiguous(), self.sent, self.received, group=self.group)
        return F.embedding_bag(self.slots_TS, rows_ND, mode="sum")


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items_TD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.scatter(items_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.collect(grad_MD), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.collect(rows_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.scatter(grad_TD), None


class ExpertParallel:
    """A `Dispatcher` over the ranks of a group; rank r holds the r-th equal part of the experts.

    A (token, choice) pair is one row, with its routing weight; experts of another rank see it as a token of one choice.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Weighted sum [T, D] of the outputs of every token's chosen experts."""
        blocks = arrange(routing.experts_TS, routing.scores_TE.shape[1])
        counts = [count for group in blocks.groups for count in group.counts]
        sent_PE = torch.tensor(counts, device=x_TD.device).view(self._group.size(), -1)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=self._group)
        sizes = sent_PE.sum(1).tolist(), received_PE.sum(1).tolist()
        tokens = Exchange(self._group, blocks.tokens_N, blocks.slots_TS, *sizes)
        pairs = Exchange(self._group, blocks.source_N, blocks.slots_TS.view(-1, 1), *sizes)
        x_MD = _Scatter.apply(x_TD, tokens)  # type: ignore[no-untyped-call]
        weights_M1 = _Scatter.apply(routing.weights_TS.reshape(-1, 1), pairs)  # type: ignore[no-untyped-call]
        numbers = torch.arange(sent_PE.shape[1], device=x_TD.device).repeat(len(sent_PE))
        chosen_M1 = numbers.repeat_interleave(received_PE.flatten())[:, None]
        result: Tensor = _Collect.apply(experts(x_MD, chosen_M1, weights_M1), tokens)  # type: ignore[no-untyped-call]
        return result


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
            setattr(mixture.experts, name, nn.Parameter(weight.detach()[mine.start : mine.stop].clone()))
