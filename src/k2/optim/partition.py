"""Which optimizer owns which part of which parameter, read from the layout and proved complete. Torch-free."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from k2.model.layout import LogicalTensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Equal logical matrices inside one parameter: the gate halves of all experts, or one plain projection.

    shape: rows and columns of one matrix.
    count: how many there are.
    """

    parameter: str
    rows: slice | None
    shape: tuple[int, int]
    count: int

    def of(self, tensor: Any) -> Any:
        """This block's `[count, rows, columns]` view of the parameter, its gradient or its momentum."""
        view = tensor if self.rows is None else tensor[..., self.rows, :]
        return view if view.dim() == 3 else view[None]


@dataclass(frozen=True)
class Partition:
    """Muon's matrices and AdamW's parameters."""

    blocks: tuple[Block, ...]
    adamw: tuple[str, ...]


def partition(layout: Iterable[LogicalTensor], shapes: Mapping[str, Shape]) -> Partition:
    """Divide the trained parameters, given by name and shape, between Muon and AdamW.

    Raises:
        ValueError: a parameter is in no group or in two, or the layout's parts do not tile it exactly.
    """
    parts: dict[str, list[LogicalTensor]] = defaultdict(list)
    for tensor in layout:
        if tensor.group != "none":
            parts[tensor.parameter].append(tensor)
    if parts.keys() != shapes.keys():
        raise ValueError(f"parameters without exactly one optimizer: {sorted(parts.keys() ^ shapes.keys())}")
    for name, tensors in parts.items():
        _check_tiling(name, tensors, shapes[name])
    blocks = [block for name, tensors in parts.items() if tensors[0].group == "muon" for block in _blocks(tensors)]
    return Partition(tuple(blocks), tuple(name for name, tensors in parts.items() if tensors[0].group == "adamw"))


def _check_tiling(name: str, tensors: list[LogicalTensor], shape: Shape) -> None:
    groups = {tensor.group for tensor in tensors}
    intervals: dict[Shape, list[tuple[int, int]]] = defaultdict(list)
    for tensor in tensors:
        start = tensor.rows.start if tensor.rows else 0
        intervals[tensor.index or ()].append((start, start + tensor.shape[0]))
    stacked = shape[: len(tensors[0].index or ())]
    rows, columns = shape[len(stacked)], shape[len(stacked) + 1 :]
    tiled = len(intervals) == prod(stacked) and all(_tiles(found, rows) for found in intervals.values())
    if len(groups) > 1 or not tiled or any(tensor.shape[1:] != columns for tensor in tensors):
        raise ValueError(f"{name} {shape} is not divided exactly by its logical tensors, groups {sorted(groups)}")


def _tiles(intervals: list[tuple[int, int]], rows: int) -> bool:
    edges = sorted(intervals)
    starts, ends = [start for start, _ in edges], [end for _, end in edges]
    return [*starts, rows] == [0, *ends]


def _blocks(tensors: list[LogicalTensor]) -> list[Block]:
    """One block for every distinct range of rows, over all experts."""
    found: dict[tuple[int, int] | None, list[LogicalTensor]] = defaultdict(list)
    for tensor in tensors:
        found[(tensor.rows.start, tensor.rows.stop) if tensor.rows else None].append(tensor)
    return [
        Block(same[0].parameter, same[0].rows, (same[0].shape[0], same[0].shape[1]), len(same))
        for same in found.values()
    ]
