"""The learning rate as a pure function of the tokens seen, and what else changes with them. Torch-free.

Kimi K2 (report, section 2.5): warm-up, a constant rate (WSD), cosine decay, annealing, a long-context phase.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    tokens: its length.
    lr_end: learning rate at its end; it begins with the end of the phase before, the first one with zero.
    shape: how the rate gets there; "constant" holds lr_end throughout.
    context_length: tokens per sequence.
    yarn: whether rotary positions are stretched by YaRN.
    """

    name: str
    tokens: int
    lr_end: float
    shape: Shape
    context_length: int = 0
    yarn: bool = False

    def lr(self, progress: float, lr_start: float) -> float:
        """The rate after a share `progress` (0 to 1) of the phase."""
        if self.shape == "constant":
            return self.lr_end
        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return lr_start + (self.lr_end - lr_start) * share


class Schedule:
    """Phases one after another."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = [phase for phase in phases if phase.tokens > 0]
        self._ends = list(accumulate(phase.tokens for phase in self.phases))

    @property
    def tokens(self) -> int:
        """Tokens of all phases."""
        return self._ends[-1]

    def index(self, tokens: int) -> int:
        """Number of the phase that the token after `tokens` falls into; the last one beyond the end."""
        return next((i for i, end in enumerate(self._ends) if tokens < end), len(self.phases) - 1)

    def phase(self, tokens: int) -> Phase:
        """The phase that the token after `tokens` falls into; the last one beyond the end."""
        return self.phases[self.index(tokens)]

    def end(self, index: int) -> int:
        """Tokens seen when phase `index` ends."""
        return self._ends[index]

    def lr(self, tokens: int) -> float:
        """Learning rate of the update after which `tokens` tokens were seen."""
        index = self.index(tokens - 1)
        phase = self.phases[index]
        lr_start = self.phases[index - 1].lr_end if index else 0.0
        progress = 1 - (self._ends[index] - tokens) / phase.tokens
        return phase.lr(min(progress, 1.0), lr_start)


def warmup_cosine(lr: float, warmup_tokens: int, total_tokens: int, final_ratio: float = 0.1) -> Schedule:
    """Linear warm-up to `lr`, then cosine decay to `final_ratio * lr`: the schedule of fine-tuning stages."""
    return Schedule(
        [
            Phase("warmup", warmup_tokens, lr, "linear"),
            Phase("decay", total_tokens - warmup_tokens, lr * final_ratio, "cosine"),
        ]
    )
