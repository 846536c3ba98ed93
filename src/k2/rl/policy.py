"""The policy as inference has it: weights of its own, brought by the weight synchronisation that ranks use too.

Training and inference take turns on the same workers, each with the memory that the other one does not need.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from k2.distributed.handover import Temporary, lent
from k2.distributed.pieces import weights
from k2.distributed.sync import WeightSync
from k2.model.generate import Engine
from k2.model.transformer import Transformer
from k2.training.state import TrainState


class Policy:
    """Inference with the weights of a training run."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._model = Transformer(state.model.config, compute_dtype=state.model.compute_dtype)
        self._sync = WeightSync(weights(state.model), weights(self._model))
        self._memory = Temporary(self._model.state_dict().values())

    @property
    def version(self) -> int:
        """Optimizer steps that had been made when the weights that inference has were sent."""
        assert self._sync.version is not None, "a turn sends the first version"
        return self._sync.version

    @contextmanager
    def turn(self) -> Iterator[Engine]:
        """Inference's turn: the present weights are sent, and training's memory is given away until the end.

        Optimizer state goes before the weights come, and the weights that were trained once they are sent.
        """
        self._state.optimizer.zero_grad()
        with lent(self._state.optimizer.state_dict().values()), self._memory:
            self._sync.send(self._state.step)
            with lent(self._state.model.state_dict().values()):
                engine = Engine(self._model)
                try:
                    yield engine
                finally:
                    del engine.prepared  # matrices of its own
