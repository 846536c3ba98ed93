"""What a finished arm of a study answers: pass rates on covered and uncovered held-out problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2.evaluation.harness import MODES
from k2.store.artifacts import Artifact

PARTS = ("covered", "uncovered")
RATES = tuple(f"{part}_{mode}" for part in PARTS for mode in MODES)


@dataclass(frozen=True)
class Answers:
    """Whether each held-out problem is covered, and by mode whether it was solved."""

    prompts: Sequence[str]
    covered: NDArray[np.bool_]
    passes: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, answers: Mapping[str, Any]) -> "Answers":
        """From the content of `answers.json`."""
        passes: dict[str, NDArray[np.float64]] = {mode: np.array(answers[mode], dtype=np.float64) for mode in MODES}
        return cls(answers["prompts"], np.array(answers["covered"], dtype=np.bool_), passes)

    def rates(self) -> dict[str, float]:
        """Share of the problems solved, by part and mode; zero of none."""
        sides = {"covered": self.covered, "uncovered": ~self.covered}
        return {
            f"{part}_{mode}": float(self.passes[mode][sides[part]].sum() / max(1, sides[part].sum()))
            for part in PARTS
            for mode in MODES
        }


def read_answers(artifact: Artifact) -> Answers:
    """The answers that the stage `tune` left."""
    return Answers.of(artifact.json("answers.json"))
