"""Where the prompts of RL come from: verifiable tasks, and general requests without a verifier; torch-free."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from k2.evaluation.tasks import Example, sample_mixture
from k2.generation.protocol import Message

GENERAL = "general"
"""Task name of prompts that only the rubric judges."""


def opening_requests(path: Path) -> list[list[Message]]:
    """What precedes the first assistant message of each dialog in a `trajectories.jsonl`, tools left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [_before_assistant(row["messages"]) for row in rows]


def general_example(messages: Sequence[Message]) -> Example:
    """A prompt without a verifier and without a right answer."""
    return Example(GENERAL, messages, (), {"role": "assistant", "content": ""})


def _before_assistant(messages: Sequence[Message]) -> list[Message]:
    roles = [message["role"] for message in messages]
    return list(messages[: roles.index("assistant")])


class Prompts:
    """An endless numbered list of prompts. The name of a prompt is JSON-ready and enough to find it again."""

    def __init__(
        self, tasks: Mapping[str, float], general: Sequence[Sequence[Message]], general_share: float, seed: int
    ) -> None:
        self._tasks, self._general, self._seed = tasks, general, seed
        self._share = general_share if general else 0.0

    def name(self, number: int) -> dict[str, Any]:
        """Which prompt stands at a place of the list."""
        random = Random(f"prompts/{self._seed}/{number}")
        if random.random() < self._share:
            return {"kind": GENERAL, "index": random.randrange(len(self._general))}
        return {"kind": "task", "index": number}

    def example(self, name: Mapping[str, Any]) -> Example:
        """The prompt behind a name."""
        if name["kind"] == GENERAL:
            return general_example(self._general[name["index"]])
        return sample_mixture(self._tasks, "train", self._seed, name["index"])
