"""One model that answers: a question in the terms of no protocol, and the pieces of its answers."""

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.model.generate import Engine
from k2.model.sampling import SamplingConfig
from k2.monitoring.metrics import ServeMetrics
from k2.serving.answer import AnswerText, end_ids
from k2.serving.batching import Batcher, Token
from k2.serving.chat_template import Message, Tool, encode_chat
from k2.serving.tool_calls import ToolCall, parse_assistant


@dataclass(frozen=True)
class Question:
    """A dialog to continue by `n` answers; `max_tokens` None takes what the context leaves, `seed` None any."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """How a sample ended: reason "stop", "length" or "tool_calls"; `stopped_by` is the stop string, if one did."""

    reason: str
    stopped_by: str | None
    calls: list[ToolCall]


@dataclass(frozen=True)
class Piece:
    """What one more token adds to a sample: text that can be shown (perhaps none), and on the last its end."""

    sample: int
    text: str
    token: Token
    ending: Ending | None


@dataclass
class Answer:
    """The pieces of one sample put together."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    ending: Ending | None = None

    def add(self, piece: Piece) -> None:
        """The next piece."""
        self.text += piece.text
        self.tokens.append(piece.token)
        self.ending = piece.ending


class Service:
    """A model with its tokenizer behind a batch that all askers share."""

    def __init__(
        self, name: str, engine: Engine, tokenizer: Tokenizer, *, rows: int, context: int | None, system: str | None
    ) -> None:
        """Answer at most `rows` samples at a time, of at most `context` tokens each (the model's own when None).

        `name` is what requests call the model; `system` is said where a dialog has no system message.

        Raises:
            UserError: the model's context is shorter.
        """
        self.name, self.tokenizer, self._engine, self._system = name, tokenizer, engine, system
        longest = engine.model.config.max_position_embeddings
        self.context = context or longest
        if self.context > longest:
            raise UserError(f"--context is {context}, this model has {longest}")
        self.batcher = Batcher(engine, rows, self.context, most_open=8 * rows)
        self.metrics = ServeMetrics(name)

    def encode(self, question: Question) -> list[int]:
        """Tokens of the dialog up to where the assistant begins."""
        return encode_chat(
            self.tokenizer, question.messages, question.tools, add_generation_prompt=True, default_system=self._system
        ).ids

    def sampling(self, question: Question, prompt: Sequence[int]) -> SamplingConfig:
        """How the question is sampled.

        Raises:
            UserError: a value out of range, or more tokens than the context has.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(f"messages have {len(prompt)} tokens with their frame; at most {self.context - 1} fit")
        config = SamplingConfig(
            room if question.max_tokens is None else question.max_tokens, question.temperature, question.top_p,
            question.top_k, secrets.randbits(63) if question.seed is None else question.seed, end_ids(self.tokenizer),
        )  # fmt: skip
        self._engine.check([prompt], [config])
        return config

    async def answer(self, question: Question, prompt: Sequence[int], config: SamplingConfig) -> AsyncGenerator[Piece]:
        """Pieces of all samples as they come, until each has its ending."""
        with self.metrics.question(len(prompt)) as count:
            async with aclosing(self._pieces(question, prompt, config)) as pieces:
                async for piece in pieces:
                    count()
                    yield piece

    async def _pieces(self, question: Question, prompt: Sequence[int], config: SamplingConfig) -> AsyncGenerator[Piece]:
        texts = [AnswerText(self.tokenizer, question.stop, hide_calls=bool(question.tools)) for _ in range(question.n)]
        open_samples = set(range(question.n))
        async with aclosing(self.batcher.generate(prompt, question.n, config)) as tokens:
            async for token in tokens:
                if token.sample not in open_samples:
                    continue
                text = texts[token.sample]
                shown, ending = text.add(token.token), None
                if token.finish_reason is not None or text.stopped_by is not None:
                    shown += text.finish()
                    ending = _ending(text, token.finish_reason or "stop")
                    open_samples.remove(token.sample)
                yield Piece(token.sample, shown, token, ending)
                if not open_samples:
                    return

    async def answers(self, question: Question, prompt: Sequence[int], config: SamplingConfig) -> list[Answer]:
        """All samples, complete."""
        found = [Answer() for _ in range(question.n)]
        async with aclosing(self.answer(question, prompt, config)) as pieces:
            async for piece in pieces:
                found[piece.sample].add(piece)
        return found


def _ending(text: AnswerText, reason: str) -> Ending:
    calls = [call for call in parse_assistant(text.text)[1] if "error" not in call]
    return Ending("tool_calls" if calls else "stop" if text.stopped_by else reason, text.stopped_by, calls)
