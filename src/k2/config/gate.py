"""The rule by which a new model replaces the champion."""

from typing import Literal

from k2.config.base import StageSection, setting


class GateConfig(StageSection):
    """Scores are named as `evaluate` reports them. A perplexity or loss is better when lower, all else when higher."""

    alias: str = setting("champion", "the alias that names the best model", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    primary: str = setting("addition_3/greedy", "the score that must improve", min_length=1)
    min_improvement: float = setting(
        0.0, "the 95% interval of the improvement of the primary score must lie above this", ge=0
    )
    max_regression: dict[str, float] = setting(
        {}, "scores that must not be worse than the champion's by more than this"
    )
    floors: dict[str, float] = setting(
        {}, "bounds every model must hold, also the first: at least this, or at most for a perplexity or loss"
    )
    new_protocol: Literal["keep", "promote"] = setting(
        "keep", "what to do when the champion's primary score was measured differently and cannot be compared"
    )
