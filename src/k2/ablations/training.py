"""What a finished training says: its losses and attention logits over tokens and FLOPs.

Letters in shapes: S rows of the history, N layers, H heads, G points of a grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2.config.pretrain import PretrainConfig
from k2.model.layout import flops_per_token
from k2.store.artifacts import Artifact

Floats = NDArray[np.float64]

SMOOTHING = 0.05
"""Share of a training whose losses one smoothed loss averages."""

LATE = 0.25
"""Share of a training that counts as its end, and the width of the windows in which clipping is counted."""


@dataclass(frozen=True)
class Training:
    """One training.

    tokens_S, raw_loss_S, loss_S: tokens seen, cross-entropy, and its trailing mean for figures.
    logit_S: largest attention logit of all layers and heads.
    clipped_S: share of the heads that QK-Clip scaled, per step.
    counts_NH: how often each head was clipped.
    """

    config: PretrainConfig
    heldout_loss: float
    tokens_S: Floats
    raw_loss_S: Floats
    loss_S: Floats
    logit_S: Floats
    clipped_S: Floats
    counts_NH: Floats

    def cost_S(self, axis: str) -> Floats:
        """Tokens, or the FLOPs of training on them (three times the forward pass)."""
        per_token = 3 * flops_per_token(self.config.model, self.config.context_length)
        return self.tokens_S * (per_token if axis == "flops" else 1)

    def clipping_by_quarter(self) -> Floats:
        """Share of heads clipped in a step, mean over each quarter of the training, [4]."""
        return np.array([part.mean() for part in np.array_split(self.clipped_S, round(1 / LATE))])

    def last_clip(self) -> float:
        """Share of the training after which no head was clipped; 0 if none ever was."""
        return float(np.flatnonzero(self.clipped_S).max(initial=-1) + 1) / len(self.clipped_S)


def read_training(artifact: Artifact) -> Training:
    """A training from its checkpoint artifact."""
    config = PretrainConfig.model_validate(artifact.manifest.provenance["config"])
    return training_of(config, artifact.json("report.json"), artifact.statistics["heldout_loss"])


def training_of(config: PretrainConfig, report: Mapping[str, Any], heldout_loss: float) -> Training:
    """A training from the report of the stage `pretrain`."""
    curves = {name: np.array(values, dtype=np.float64) for name, values in report["curves"].items() if values != []}
    steps_S = np.diff(curves["step"], prepend=0.0)
    counts_NH = np.array(report["clip_counts"], dtype=np.float64)
    return Training(
        config=config,
        heldout_loss=heldout_loss,
        tokens_S=curves["tokens"],
        raw_loss_S=curves["cross_entropy"],
        loss_S=_trailing_mean(curves["cross_entropy"], max(1, round(SMOOTHING * len(steps_S)))),
        logit_S=curves["max_logits"].max(axis=1),
        clipped_S=curves["clipped_heads"] / steps_S / counts_NH.size,
        counts_NH=counts_NH,
    )


def _trailing_mean(values: Floats, window: int) -> Floats:
    """Mean of the last `window` values at every position, of fewer at the beginning."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
