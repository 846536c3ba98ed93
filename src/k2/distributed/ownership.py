"""Who owns what: weights that several ranks hold are divided among them for gradients and optimizer state. Torch-free.

Muon needs whole matrices, so whole matrices are what a rank owns, and no rank gathers a momentum before Newton-Schulz
as Moonlight's Algorithm 1 does (arXiv 2502.16982, section 2.3). AdamW works on values; its weights are cut by rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import prod
from typing import Any

from k2.model.layout import LogicalTensor


@dataclass(frozen=True)
class Shard:
    """Entries `start` to `stop` of a parameter's first axis; `name` is the parameter's own when that is all of it."""

    name: str
    parameter: str
    start: int
    stop: int

    def of(self, tensor: Any) -> Any:
        """This shard's view of the parameter or its gradient."""
        return tensor[self.start : self.stop]


def local_layout(layout: Iterable[LogicalTensor], experts: range) -> list[LogicalTensor]:
    """The tensors that a rank with these experts holds, experts numbered from 0 as in its parameters."""
    found = []
    for tensor in layout:
        if tensor.shard_axis is None:
            found.append(tensor)
        elif tensor.index is not None and tensor.index[0] in experts:
            found.append(replace(tensor, index=(tensor.index[0] - experts.start,)))
    return found


def newton_schulz_work(shape: tuple[int, ...]) -> int:
    """Operations of one iteration on one matrix: 4 m^2 n + 2 m^3 with m the shorter side."""
    short, long = sorted(shape)
    return 4 * short * short * long + 2 * short**3


def owners(layout: Iterable[LogicalTensor], lengths: Mapping[str, int], members: int) -> list[list[Shard]]:
    """The shards of each member: balanced in Newton-Schulz work, and in values of what AdamW updates.

    Heaviest first, each to the member with the least work (Graham's rule: at most 4/3 of the best division).

    Args:
        layout: all tensors of the parameters to divide, each parameter's together.
        lengths: first axis of every parameter.
        members: ranks that hold these parameters.
    """
    muon, adamw = dict[Shard, int](), dict[Shard, int]()
    for tensor in layout:
        if tensor.group == "muon":
            shard = _whole_matrices(tensor, lengths[tensor.parameter], members)
            muon[shard] = muon.get(shard, 0) + newton_schulz_work(tensor.shape)
        elif tensor.group == "adamw":
            rows = members if len(tensor.shape) > 1 else 1
            size = prod(tensor.shape[1:])
            adamw |= {
                _shard(tensor.parameter, part, tensor.shape[0]): len(part) * size
                for part in _parts(tensor.shape[0], rows)
            }
    return [
        sorted(a + b, key=lambda shard: (shard.parameter, shard.start))
        for a, b in zip(_spread(muon, members), _spread(adamw, members), strict=True)
    ]


def _whole_matrices(tensor: LogicalTensor, length: int, members: int) -> Shard:
    """The matrix itself, or the run of neighbouring experts that it belongs to."""
    if tensor.index is not None:
        part = next(part for part in _parts(length, members) if tensor.index[0] in part)
    else:
        part = range(length) if tensor.rows is None else range(tensor.rows.start, tensor.rows.stop)
    return _shard(tensor.parameter, part, length)


def _parts(length: int, count: int) -> list[range]:
    """At most `count` parts of equal length, give or take one."""
    edges = [length * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(edges) if start < stop]


def _shard(parameter: str, part: range, length: int) -> Shard:
    name = parameter if len(part) == length else f"{parameter}[{part.start}:{part.stop}]"
    return Shard(name, parameter, part.start, part.stop)


def _spread(work: Mapping[Shard, int], members: int) -> list[list[Shard]]:
    found: list[list[Shard]] = [[] for _ in range(members)]
    loads = [(0, member) for member in range(members)]
    heapify(loads)
    for shard in sorted(work, key=lambda shard: (-work[shard], shard.parameter, shard.start)):
        load, member = heappop(loads)
        found[member].append(shard)
        heappush(loads, (load + work[shard], member))
    return found


def shard_layout(layout: Iterable[LogicalTensor], shards: Iterable[Shard]) -> list[LogicalTensor]:
    """The layout of shards as if each were a parameter of its own, which is what an optimizer is given."""
    parts: dict[str, list[LogicalTensor]] = defaultdict(list)
    for tensor in layout:
        parts[tensor.parameter].append(tensor)
    return [_within(tensor, shard) for shard in shards for tensor in parts[shard.parameter] if _contains(shard, tensor)]


def _contains(shard: Shard, tensor: LogicalTensor) -> bool:
    if tensor.index is not None:
        return shard.start <= tensor.index[0] < shard.stop
    return tensor.rows is None or tensor.rows.start == shard.start


def _within(tensor: LogicalTensor, shard: Shard) -> LogicalTensor:
    if tensor.index is not None:
        return replace(tensor, parameter=shard.name, index=(tensor.index[0] - shard.start,))
    start = 0 if tensor.rows is not None else shard.start
    shape = (shard.stop - shard.start, *tensor.shape[1:])
    return replace(tensor, parameter=shard.name, rows=None, shape=shape, start=start)
