"""Everything `evaluate` measures of one model; the same for all models, so that their scores stand side by side."""

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2.agentic.tools import ToolSpec
from k2.config.base import canonical_json
from k2.config.evaluate import EvaluateConfig
from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.evaluation.gate import Score
from k2.evaluation.harness import MODES, answers, evaluate, heldout_loss
from k2.evaluation.scoring import bootstrap
from k2.evaluation.tasks import Task, ToolCall, get_task, split_seed
from k2.generation.protocol import Tool
from k2.model.generate import Engine
from k2.model.transformer import Transformer
from k2.serving.chat_template import encode_chat

log = logging.getLogger(__name__)

PERPLEXITY = "heldout/perplexity"
BLOCK_ROWS = 2
"""Rows of held-out text whose mean loss is one observation of the perplexity's interval."""


def heldout_tool_tasks(specs: Iterable[ToolSpec], tokenizer: Tokenizer, room: int) -> list[Task]:
    """Tool-call tasks over tools that training never saw: one over real servers, one over synthetic domains.

    A prompt declares two tools and repeats a description; tools that leave no room for that in `room` tokens are left
    out and logged.
    """
    unique = {(spec.world, spec.name): spec for spec in specs}
    tools: dict[str, list[Tool]] = {"heldout_servers": [], "heldout_domains": []}
    for (world, name), spec in sorted(unique.items()):
        declaration = spec.declaration()
        if 3 * len(encode_chat(tokenizer, [], [declaration], default_system=None).ids) > room:
            log.warning("the declaration of held-out tool %s (%s) is too long for the model's context", name, world)
        else:
            tools["heldout_servers" if world.startswith("mcp:") else "heldout_domains"].append(declaration)
    return [task for name, declared in tools.items() for task in _tool_task(name, declared)]


def _tool_task(name: str, tools: Sequence[Tool]) -> list[Task]:
    try:
        return [ToolCall(name, tools)]
    except UserError as error:
        log.warning("not measured: %s", error)
        return []


@dataclass(frozen=True)
class Suite:
    """The tasks, the held-out text, and how to measure.

    tokens, offsets: held-out token stream and document starts (the last offset is the end).
    tool_tasks: from `heldout_tool_tasks`.
    """

    config: EvaluateConfig
    tokenizer: Tokenizer
    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    tool_tasks: Sequence[Task]

    @cached_property
    def _tasks(self) -> list[tuple[Task, int]]:
        config, tasks = self.config, [*map(get_task, self.config.tasks), *self.tool_tasks]
        return [(task, config.tool_items if isinstance(task, ToolCall) else config.items) for task in tasks]

    def measure(self, model: Transformer) -> dict[str, Score]:
        """Perplexity, and the sampled and greedy pass rate of every task, as `task/mode`."""
        config, engine = self.config, Engine(model)
        scores = {PERPLEXITY: self._perplexity(model)}
        for task, items in self._tasks:
            for mode in MODES:
                result = evaluate(engine, self.tokenizer, [task], items, mode, config.seed, config.max_tokens)
                rate = result[task.name]
                scores[f"{task.name}/{mode}"] = Score(
                    value=rate["accuracy"],
                    low=rate["low"],
                    high=rate["high"],
                    n=rate["n"],
                    protocol=self._protocol(task, items, mode),
                )
        return scores

    def samples(self, model: Transformer) -> list[dict[str, Any]]:
        """A few greedy answers to each task, to read."""
        config, engine = self.config, Engine(model)
        rows: list[dict[str, Any]] = []
        for task, items in self._tasks:
            seed = split_seed("eval", config.seed)
            examples = [task.sample(seed, index) for index in range(min(config.samples, items))]
            texts = answers(engine, self.tokenizer, examples, "greedy", config.seed, config.max_tokens)
            for example, text in zip(examples, texts, strict=True):
                prompt = str(example.messages[-1]["content"])
                rows.append({"task": task.name, "prompt": prompt, "answer": text, "score": task.score(example, text)})
        return rows

    def _perplexity(self, model: Transformer) -> Score:
        losses = [heldout_loss(model, tokens, offsets, self._context, BLOCK_ROWS) for tokens, offsets in self._blocks()]
        low, high = bootstrap(losses, seed=self.config.seed)
        text = np.ascontiguousarray(self.tokens[: self.config.heldout_tokens]).tobytes()
        protocol = _fingerprint("perplexity", hashlib.sha256(text).hexdigest(), self._context)
        value, n = float(np.mean(losses)), len(losses) * BLOCK_ROWS * self._context
        return Score(
            value=math.exp(value), low=math.exp(low), high=math.exp(high), n=n, better="lower", protocol=protocol
        )

    @property
    def _context(self) -> int:
        return self.config.context_length

    def _blocks(self) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Slices of the held-out stream, each of whole rows and the one token after them, with its own offsets.

        Raises:
            UserError: the text is shorter than one block.
        """
        length = BLOCK_ROWS * self._context
        count = (min(len(self.tokens), self.config.heldout_tokens) - 1) // length
        if count < 1:
            raise UserError(
                f"evaluate.context_length: {BLOCK_ROWS} rows of {self._context} tokens need more than the"
                f" {min(len(self.tokens), self.config.heldout_tokens)} held-out tokens there are; choose less"
            )
        return [self._block(start, start + length + 1) for start in range(0, count * length, length)]

    def _block(self, start: int, end: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        inside = self.offsets[(self.offsets > start) & (self.offsets < end)]
        return self.tokens[start:end], np.array([0, *(inside - start), end - start], dtype=np.int64)

    def _protocol(self, task: Task, items: int, mode: str) -> str:
        examples = [task.sample(split_seed("eval", self.config.seed), index) for index in range(min(items, 8))]
        shown = [[example.messages, list(example.tools)] for example in examples]
        return _fingerprint(task.name, items, mode, self.config.seed, self.config.max_tokens, shown)


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
