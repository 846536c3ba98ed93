"""Ranks that compute longer than others with the same work: a GPU that throttles, a neighbour that takes the CPU."""

from collections.abc import Sequence
from statistics import median_low

FACTOR = 1.5
"""A rank is slow when it computes this many times as long as its peers' median."""
STEPS = 10
"""Over so many steps, so that one garbage collection accuses nobody."""


class SlowRanks:
    """Compares ranks that do the same: `peers` neighbours in rank order, the ranks of a pipeline stage."""

    def __init__(self, peers: int) -> None:
        self._peers = peers
        self._seconds: list[Sequence[float]] = []

    def update(self, seconds: Sequence[float]) -> str | None:
        """Take in how long each rank computed in a step; every `STEPS` steps says which were slow, if any were."""
        self._seconds.append(seconds)
        if len(self._seconds) < STEPS:
            return None
        # The least of a few steps: what a rank cannot do faster.
        least = [min(values) for values in zip(*self._seconds, strict=True)]
        self._seconds.clear()
        usual = [median_low(least[start : start + self._peers]) for start in range(0, len(least), self._peers)]
        pairs = [(rank, own, usual[rank // self._peers]) for rank, own in enumerate(least)]
        slow = [
            f"rank {rank}: {own:.3f} s, its peers {peers:.3f} s" for rank, own, peers in pairs if own > FACTOR * peers
        ]
        return "; ".join(slow) or None
