"""Checkpoints of a running stage: everything a killed run needs to end in the same bytes as one never killed.

Each one is two objects committed at once: tensors (weights, selection biases, optimizer state in its own precision,
QK-Clip counters, the random generator) and JSON (step, tokens, data position, curves). The last two are kept.
"""

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from k2.errors import StageError
from k2.store.work import WorkArea
from k2.training.history import History
from k2.training.state import Source, TrainState

KEEP = 2
"""Checkpoints kept: should the newest be corrupt, the one before leads to the same bytes."""

_NAME = re.compile(r"checkpoint-(\d+)\.json")
_SCALARS = ("step", "tokens", "skipped", "mean_loss", "notes")
_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves to and restores from a stage's work area, every `interval` steps."""

    def __init__(self, work: WorkArea, interval: int) -> None:
        self._work, self._interval = work, interval

    def step(self, state: TrainState, source: Source[Any]) -> bool:
        """Save if the interval says so; returns whether it did."""
        due = state.step % self._interval == 0
        if due:
            self.save(state, source)
        return due

    def save(self, state: TrainState, source: Source[Any]) -> None:
        """Commit one checkpoint and forget all but the last two."""
        values = values_of(state) | {"source": source.state_dict()}
        name = f"checkpoint-{state.step:09d}"
        old = [
            n for step in self._steps()[: 1 - KEEP] for n in _objects(f"checkpoint-{step:09d}") if step != state.step
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tensors"
            save_file(_tensors(state), path)
            tensors, document = _objects(name)
            self._work.save({tensors: path, document: json.dumps(values, sort_keys=True).encode()}, drop=old)

    def wait(self) -> None:
        """Nothing is saved in the background here."""

    def restore(self, state: TrainState, source: Source[Any]) -> bool:
        """Bring state and source to the newest intact checkpoint; False when there is none.

        Raises:
            StageError: every checkpoint is corrupt.
        """
        steps = self._steps()
        for step in reversed(steps):
            try:
                tensors, document = (self._load(name) for name in _objects(f"checkpoint-{step:09d}"))
            except StageError as error:
                if step == steps[0]:
                    raise
                _log.warning("checkpoint of step %d cannot be read, taking the one before: %s", step, error)
                continue
            values = json.loads(document)
            _restore(state, load(tensors), values)
            source.load_state_dict(values["source"])
            return True
        return False

    def _steps(self) -> list[int]:
        return sorted(int(found[1]) for found in map(_NAME.fullmatch, self._work.names()) if found)

    def _load(self, name: str) -> bytes:
        data = self._work.load(name)
        if data is None:
            raise StageError(f"the checkpoint has no object {name!r}")
        return data


def _objects(name: str) -> tuple[str, str]:
    return f"{name}.safetensors", f"{name}.json"


def _tensors(state: TrainState) -> dict[str, Tensor]:
    model = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    optimizer = {f"optimizer.{name}": tensor for name, tensor in state.optimizer.state_dict().items()}
    return {n: t.contiguous() for n, t in (model | optimizer | {"rng": torch.get_rng_state()}).items()}


def values_of(state: TrainState) -> dict[str, Any]:
    """What is no tensor, JSON-ready."""
    scalars = {name: getattr(state, name) for name in _SCALARS}
    return scalars | {"history": vars(state.history)}


def _restore(state: TrainState, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}

    state.model.load_state_dict(part("model."))
    state.optimizer.load_state_dict(part("optimizer."))
    torch.set_rng_state(tensors["rng"])
    set_values(state, values)


def set_values(state: TrainState, values: Mapping[str, Any]) -> None:
    """Take over what `values_of` gave."""
    for name in _SCALARS:
        setattr(state, name, values[name])
    state.history = History(**values["history"])
