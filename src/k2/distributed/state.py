"""A training run's state as pieces: what its rank owns of weights and optimizer, selection biases, counters, RNG."""

from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from k2.distributed.pieces import MASTER, WEIGHT, Piece, pieces_of, whole
from k2.errors import UserError
from k2.model.layout import LogicalTensor, logical_tensors
from k2.training.state import TrainState

LATER = frozenset({"rope_scaling", "max_position_embeddings"})
"""Fields of a model that a run changes on its way."""


class Owner(Protocol):
    """What of a model a rank owns; a `DistributedPlan` is one."""

    @property
    def owned(self) -> tuple[dict[str, nn.Parameter], list[LogicalTensor]]:
        """Parameters by name and the tensors in them, as the rank's optimizer has them."""

    def share_weights(self) -> None:
        """Bring every owner's weights to all ranks that hold them."""


class LiveState:
    """The tensors of a run that a checkpoint holds, as views: saving reads them, restoring writes into them.

    Weights are saved once, in the optimizer's precision, by who updates them.
    """

    def __init__(self, state: TrainState, owner: Owner | None, stream: int) -> None:
        """`stream`: whose random numbers; a rank's own when it saves."""
        self._state, self._owner = state, owner
        tensors = logical_tensors(state.model.config)
        self._shapes = {tensor.name: tensor.shape for tensor in tensors}
        self._parameters, layout = owner.owned if owner else (dict(state.model.named_parameters()), tensors)
        self._optimizer: dict[str, Tensor] = state.optimizer.state_dict()
        self._random = torch.get_rng_state()
        biases = [tensor for tensor in tensors if tensor.group == "none"]
        self.pieces = [
            *self._states(layout),
            *pieces_of(state.model.state_dict(), biases, self._shapes, WEIGHT),
            whole(f"rng/{stream}", self._random),
        ]

    def _states(self, layout: list[LogicalTensor]) -> list[Piece]:
        """Weights and whatever the optimizer keeps, by kind."""
        kinds: dict[str, dict[str, Tensor]] = defaultdict(dict)
        others = []
        for key, tensor in self._optimizer.items():
            kind, _, name = key.partition(".")
            if name in self._parameters:
                kinds[kind][name] = tensor
            else:
                others.append(whole(key.replace(".", "/"), tensor))
        kinds[WEIGHT] = self._parameters | kinds.pop(MASTER, {})
        return [
            piece for kind in sorted(kinds) for piece in pieces_of(kinds[kind], layout, self._shapes, kind)
        ] + others

    @torch.no_grad()
    def written(self) -> None:
        """Let model, optimizer and random generator have what the pieces were overwritten with."""
        self._state.optimizer.load_state_dict(self._optimizer)
        for name, parameter in self._parameters.items():
            if f"{MASTER}.{name}" in self._optimizer:
                parameter.copy_(self._optimizer[f"{MASTER}.{name}"])
        if self._owner:
            self._owner.share_weights()
        torch.set_rng_state(self._random)


def refuse_other_model(saved: dict[str, Any], state: TrainState) -> None:
    """Check that a checkpoint is of this model, given its configuration.

    Raises:
        UserError: naming the first field that differs, and both values.
    """
    own = state.model.config.model_dump(mode="json")
    for name in sorted((saved.keys() | own.keys()) - LATER):
        if saved.get(name) != own.get(name):
            raise UserError(
                f"the checkpoint is of another model: model.{name} is {saved.get(name)} there and {own.get(name)} here"
            )
