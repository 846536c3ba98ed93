"""ZeRO stage 1 (arXiv 1910.02054) over ranks that hold the same parameters: each has the optimizer state of its shards.

Gradients are summed to their owners and updated weights come back, both in buckets: a bucket is one stretch of every
member's shards laid end to end, so that each member sends and receives equally much.

Letters in shapes: R members, W values of a bucket.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k2.distributed.ownership import Shard

BUCKET_VALUES = 1 << 26
"""Values of all members in a bucket, at most: 256 MiB of float32 keep every link busy, and fit anywhere."""


class Replicas:
    """Parameters that all ranks of a group hold.

    Attributes:
        own: this rank's shards by name, views of the parameters' memory; what its optimizer updates.
    """

    def __init__(
        self, group: dist.ProcessGroup, parameters: Mapping[str, nn.Parameter], shards: Sequence[Sequence[Shard]]
    ) -> None:
        self._group, self._parameters, self._shards = group, dict(parameters), shards
        self.own = {shard.name: _part(parameters[shard.parameter], shard) for shard in self.mine}
        values = [sum(part.numel() for part in parts) for parts in self._flat(self._parameters)]
        self._longest = max(values)

    @property
    def mine(self) -> Sequence[Shard]:
        """The shards that this rank owns."""
        return self._shards[self._group.rank()]

    def reduce(self) -> None:
        """Sum the gradients over the group; each member's shards get theirs, and the parameters give theirs up."""
        gradients = {name: _gradient(parameter) for name, parameter in self._parameters.items()}
        for shard in self.mine:
            self.own[shard.name].grad = torch.empty_like(shard.of(gradients[shard.parameter]))
        sums = [_flat(parameter.grad) for parameter in self.own.values() if parameter.grad is not None]
        parts = self._flat(gradients)
        for start, bucket_RW in self._buckets(gradients):
            for row_W, flat in zip(bucket_RW, parts, strict=True):
                for place, part in _overlap(flat, start, len(row_W)):
                    row_W[place] = part
            sum_W = torch.empty_like(bucket_RW[0])
            dist.reduce_scatter_single(sum_W, bucket_RW.flatten(), group=self._group)
            for place, part in _overlap(sums, start, len(sum_W)):
                part.copy_(sum_W[place])
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def gather(self) -> None:
        """Take over every owner's weights."""
        parts, me = self._flat(self._parameters), self._group.rank()
        for start, bucket_RW in self._buckets(self._parameters):
            for place, part in _overlap(parts[me], start, bucket_RW.shape[1]):
                bucket_RW[me, place] = part
            dist.all_gather_single(bucket_RW.view(-1), bucket_RW[me].clone(), group=self._group)
            for row_W, flat in zip(bucket_RW, parts, strict=True):
                for place, part in _overlap(flat, start, len(row_W)):
                    part.copy_(row_W[place])

    def _flat(self, tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Every member's shards of the tensors, as flat views."""
        return [[_flat(shard.of(tensors[shard.parameter])) for shard in shards] for shards in self._shards]

    def _buckets(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Where each bucket starts in every member's values, and zeros for it, [R, W], of the type of the tensors."""
        widest = max(1, BUCKET_VALUES // self._group.size())
        for start in range(0, self._longest, widest):
            like = next(iter(tensors.values())).detach()
            yield start, like.new_zeros(self._group.size(), min(widest, self._longest - start))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _part(parameter: nn.Parameter, shard: Shard) -> nn.Parameter:
    part = nn.Parameter(shard.of(parameter.detach()))
    part.grad_dtype = parameter.grad_dtype
    return part


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad.contiguous()


def _overlap(parts: Sequence[Tensor], start: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """The parts, laid end to end, that lie in [start, start + width): where in there, and their values."""
    position = 0
    for part in parts:
        low, high = max(start, position), min(start + width, position + len(part))
        if low < high:
            yield slice(low - start, high - start), part[low - position : high - position]
        position += len(part)
