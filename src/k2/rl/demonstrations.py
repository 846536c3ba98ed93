"""Demonstrations: dialogs with a loss on what the assistant says, packed into rows. SFT trains on them, PTX too.

Letters in shapes: B batch, L length.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k2.data.loader import IGNORE
from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.evaluation.tasks import Example, sample_mixture
from k2.serving.chat_template import EncodedChat, encode_chat
from k2.training.batches import TokenBatch, micro_batches


def encode_solution(tokenizer: Tokenizer, example: Example) -> EncodedChat:
    """The prompt and the right answer."""
    return encode_chat(tokenizer, [*example.messages, example.answer], example.tools, default_system=None)


def task_demonstrations(tokenizer: Tokenizer, tasks: Mapping[str, float], count: int, seed: int) -> list[EncodedChat]:
    """A fixed set of `count` solved problems from the training side of a mixture of tasks."""
    return [encode_solution(tokenizer, sample_mixture(tasks, "train", seed, index)) for index in range(count)]


def trajectory_demonstrations(tokenizer: Tokenizer, path: Path) -> list[EncodedChat]:
    """The dialogs of a `trajectories.jsonl`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [encode_chat(tokenizer, row["messages"], row["tools"], default_system=None) for row in rows]


class DemonstrationSource:
    """Endless steps of packed rows over a fixed set of dialogs, reshuffled every epoch.

    A dialog is never split, and dialogs that share a row do not see each other. A row is closed when the next dialog
    does not fit; its rest is padding without loss.

    Raises:
        UserError: no dialog fits into a row.
    """

    def __init__(
        self, dialogs: Iterable[EncodedChat], rows: int, length: int, micro_rows: int, pad: int, seed: int
    ) -> None:
        every = list(dialogs)
        self.dialogs = [dialog for dialog in every if len(dialog.ids) <= length + 1]
        self.dropped = len(every) - len(self.dialogs)
        if not self.dialogs:
            raise UserError(f"none of {len(every)} dialogs fits into context_length {length}; raise it")
        self._rows, self._length, self._micro_rows, self._pad, self._seed = rows, length, micro_rows, pad, seed
        self._epoch, self._position = 0, 0
        self._order = self._shuffled()

    def next_step(self) -> Sequence[TokenBatch]:
        """The micro-batches of one step."""
        filled = [self._fill_row() for _ in range(self._rows)]
        tokens_BL, targets_BL, documents_BL = (np.stack(arrays) for arrays in zip(*filled, strict=True))
        return micro_batches(tokens_BL, targets_BL, self._micro_rows, documents_BL)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position within it."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, self._epoch]).permutation(len(self.dialogs)).tolist()
        return order

    def _next(self) -> EncodedChat:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        return self.dialogs[self._order[self._position]]

    def _fill_row(self) -> tuple[Any, Any, Any]:
        tokens_L = np.full(self._length, self._pad, dtype=np.int64)
        targets_L = np.full(self._length, IGNORE, dtype=np.int64)
        documents_L = np.full(self._length, -1, dtype=np.int64)
        start = number = 0
        while start + len(self._next().ids) - 1 <= self._length:
            dialog = self._next()
            end = start + len(dialog.ids) - 1
            tokens_L[start:end] = dialog.ids[:-1]
            targets_L[start:end] = np.where(dialog.assistant_mask[1:], dialog.ids[1:], IGNORE)
            documents_L[start:end] = number
            self._position, start, number = self._position + 1, end, number + 1
        return tokens_L, targets_L, documents_L
