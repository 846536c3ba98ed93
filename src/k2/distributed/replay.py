"""Experts' choices noted and imposed: what tells rounding from routing where two runs of one model are compared.

The last bit of a score decides which expert a token goes to, and from there on two runs differ by more than rounding.
With the reference's choices imposed only rounding is left; without, flips are counted.

Letters in shapes: T tokens of a micro-batch, S choices per token, A tokens of all steps.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from k2.model.moe import MixtureOfExperts, Router
from k2.model.transformer import DecoderLayer, Transformer


class Choices:
    """Within its context, notes what the routers of a model choose, and counts the tokens that chose otherwise before.

    Args:
        expected: for each layer with experts, what the tokens chose before, [A, S] in the order of micro-batches.
        impose: let them choose so again.
    Attributes:
        flips, tokens: tokens with another set of experts than expected, over all layers, and all of them.
    """

    def __init__(self, model: Transformer, expected: Mapping[int, Tensor] | None = None, impose: bool = False) -> None:
        self.flips = self.tokens = 0
        self._seen: dict[int, list[Tensor]] = defaultdict(list)
        self._expected, self._impose, self._place = expected, impose, dict[int, int]()
        self._layers = {
            layer.mlp.gate: int(number)
            for number, layer in model.layers.items()
            if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MixtureOfExperts)
        }

    def __enter__(self) -> Self:
        self._choose = Router.choose

        def choose(router: Router, scores_TE: Tensor) -> Tensor:
            return self._next(self._layers[router], self._choose(router, scores_TE))

        Router.choose = choose  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        Router.choose = self._choose  # type: ignore[method-assign]

    def seen(self) -> dict[int, Tensor]:
        """What was chosen, [A, S] by layer."""
        return {layer: torch.cat(found) for layer, found in self._seen.items()}

    def _next(self, layer: int, experts_TS: Tensor) -> Tensor:
        self._seen[layer].append(experts_TS)
        self.tokens += len(experts_TS)
        if self._expected is None:
            return experts_TS
        place = self._place.get(layer, 0)
        self._place[layer] = place + len(experts_TS)
        expected_TS = self._expected[layer][place : place + len(experts_TS)]
        self.flips += int((experts_TS.sort().values != expected_TS.sort().values).any(1).sum())
        return expected_TS if self._impose else experts_TS


def part_of(choices: Mapping[int, Tensor], steps: int, rank: int, ranks: int) -> dict[int, Tensor]:
    """What the rows that one of several data-parallel ranks reads chose, of `steps` equal steps of one process."""
    return {
        layer: chosen_AS.view(steps, ranks, -1, chosen_AS.shape[1])[:, rank].flatten(0, 1)
        for layer, chosen_AS in choices.items()
    }
