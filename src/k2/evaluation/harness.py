"""Measuring a model: pass rates on verifiable tasks with intervals, and loss on held-out text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from k2.data.loader import IGNORE
from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.evaluation.scoring import wilson
from k2.evaluation.tasks import Example, Task, get_task, sample_mixture, split_seed
from k2.model.generate import Engine, Sample
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer
from k2.serving.chat_template import IM_END, encode_chat
from k2.training.batches import NextTokenLoss, micro_batches

Mode = Literal["sampled", "greedy"]
MODES: tuple[Mode, ...] = ("sampled", "greedy")
TEMPERATURE: dict[Mode, float] = {"sampled": 1.0, "greedy": 0.0}


@dataclass(frozen=True)
class Score:
    """A pass rate with its 95% Wilson interval over `n` items."""

    accuracy: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, passes: Sequence[bool]) -> "Score":
        """The score of items that passed or not."""
        low, high = wilson(sum(passes), len(passes))
        return cls(sum(passes) / max(1, len(passes)), low, high, len(passes))

    def json(self) -> dict[str, Any]:
        """`{"accuracy", "low", "high", "n"}`."""
        return asdict(self)


def encode_prompt(tokenizer: Tokenizer, example: Example) -> list[int]:
    """Token ids up to where the assistant begins; no system message beyond the example's own."""
    chat = encode_chat(tokenizer, example.messages, example.tools, add_generation_prompt=True, default_system=None)
    return chat.ids


def answer_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """What a sample says: its text without the end token."""
    return tokenizer.decode(token_ids).removesuffix(IM_END)


def generate_by_length(
    engine: Engine, prompts: Sequence[Sequence[int]], n: int, sampling: Sequence[SamplingConfig]
) -> list[list[Sample]]:
    """`engine.generate`, given the prompts by length, so that few long ones do not pad all others."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    samples = engine.generate([prompts[i] for i in order], n, [sampling[i] for i in order])
    return [row for _, row in sorted(zip(order, samples, strict=True), key=lambda pair: pair[0])]


def answers(
    engine: Engine, tokenizer: Tokenizer, examples: Sequence[Example], mode: Mode, seed: int, max_tokens: int
) -> list[str]:
    """One answer to each example."""
    stop = (tokenizer.special[IM_END],)
    sampling = [
        SamplingConfig(max_tokens, TEMPERATURE[mode], seed=seed * len(examples) + i, stop_ids=stop)
        for i in range(len(examples))
    ]
    prompts = [encode_prompt(tokenizer, example) for example in examples]
    samples = generate_by_length(engine, prompts, 1, sampling)
    return [answer_text(tokenizer, sample.token_ids) for (sample,) in samples]


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    n: int,
    mode: Mode,
    seed: int,
    max_tokens: int = 256,
) -> dict[str, dict[str, Any]]:
    """Pass rate of each task on `n` problems of its evaluation side: `{task: {accuracy, low, high, n}}`.

    A pass is a score of 1. The same seed gives the same problems to every model, so scores can be paired.
    """
    scores = {}
    for task in tasks:
        examples = [task.sample(split_seed("eval", seed), index) for index in range(n)]
        texts = answers(engine, tokenizer, examples, mode, seed, max_tokens)
        scores[task.name] = Score.of([task.score(e, t) >= 1 for e, t in zip(examples, texts, strict=True)]).json()
    return scores


@dataclass(frozen=True)
class MixtureResult:
    """Answers to held-out problems of a mixture of tasks."""

    examples: list[Example]
    texts: list[str]
    passes: list[bool]

    @property
    def score(self) -> Score:
        """Over all problems."""
        return Score.of(self.passes)

    def by_task(self) -> dict[str, dict[str, Any]]:
        """The score of each task's share."""
        pairs = list(zip(self.examples, self.passes, strict=True))
        names = sorted({example.task for example in self.examples})
        return {name: Score.of([passed for example, passed in pairs if example.task == name]).json() for name in names}


def evaluate_mixture(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Mapping[str, float],
    n: int,
    mode: Mode,
    seed: int,
    max_tokens: int,
) -> MixtureResult:
    """Answer `n` held-out problems of the mixture that a stage trains on."""
    examples = [sample_mixture(tasks, "eval", seed, index) for index in range(n)]
    texts = answers(engine, tokenizer, examples, mode, seed, max_tokens)
    passes = [get_task(e.task).score(e, t) >= 1 for e, t in zip(examples, texts, strict=True)]
    return MixtureResult(examples, texts, passes)


@torch.no_grad()
def heldout_loss(
    model: Transformer, tokens: NDArray[Any], offsets: NDArray[np.int64], context: int, rows: int = 8
) -> float:
    """Mean cross-entropy in nats per token over the whole rows of `context` tokens that the text yields.

    Tokens that begin a document are not predicted, because nothing before them is theirs.

    Raises:
        UserError: the text is shorter than one row.
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        raise UserError(f"held-out text has {len(tokens)} tokens, more than the context of {context} are needed")
    targets = np.asarray(tokens[1 : count * context + 1], dtype=np.int64)
    first = np.asarray(offsets[1:-1]) - 1
    targets[first[first < len(targets)]] = IGNORE
    inputs_BL = np.asarray(tokens[: count * context], dtype=np.int64).reshape(count, context)
    loss_fn, total, weight = NextTokenLoss(), 0.0, 0.0
    for batch in micro_batches(inputs_BL, targets.reshape(count, context), rows):
        loss = loss_fn(model, batch)
        total, weight = total + loss.total.item(), weight + loss.weight
    return total / weight
