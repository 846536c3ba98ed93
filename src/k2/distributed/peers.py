"""What the ranks of a run tell each other outside of a training step; in one process there is nobody to tell."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(value: T) -> T:
    """What rank 0 passes in."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """What every rank passes in, by rank."""
    found = [value] * size()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one; all ranks get the same answer."""
    return next((each for each in from_all(problem) if each is not None), None)
