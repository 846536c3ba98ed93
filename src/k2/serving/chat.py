"""A conversation with a trained model in the terminal: what `k2 chat` runs."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.model import hf
from k2.model.generate import Engine
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer
from k2.quant.checkpoint import load_int4
from k2.serving.answer import AnswerText, end_ids
from k2.serving.chat_template import encode_chat
from k2.serving.tool_calls import parse_assistant

Loader = Callable[[Path], Transformer]

HELP = "/reset starts a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True)
class ChatSettings:
    """How answers are sampled. `system` is said at the start of the conversation, None says nothing."""

    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 1.0
    seed: int = 0


def load_export(directory: Path) -> Transformer:
    """The model in an exported folder, `bf16/` or `int4/`, or in a checkpoint artifact."""
    config = directory / "config.json"
    if not config.is_file():
        raise UserError(f"{directory}: no config.json there; give a folder that `k2 export` or `k2 fetch` made")
    quantized = "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    return load_int4(directory) if quantized else hf.load(directory)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer beside a model: in the folder itself, or in `tokenizer/` of a checkpoint artifact."""
    inner = directory / "tokenizer"
    return Tokenizer.load(inner if inner.is_dir() else directory)


@dataclass
class Conversation:
    """A dialog with one model; every answer is streamed and remembered."""

    engine: Engine
    tokenizer: Tokenizer
    settings: ChatSettings = field(default_factory=ChatSettings)
    messages: list[dict[str, object]] = field(default_factory=list)
    turn: int = 0

    def say(self, text: str, show: Callable[[str], None]) -> None:
        """Answer `text`; `show` gets the answer piece by piece. Interrupted, the part said so far is remembered.

        Raises:
            UserError: the text alone does not fit into the model's context.
            KeyboardInterrupt: passed on after the part was remembered.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, room = self._prompt()
        except UserError:
            self.messages = before
            raise
        answer = AnswerText(self.tokenizer)
        sampling = SamplingConfig(
            max_tokens=room,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=self.settings.seed + self.turn,
            stop_ids=end_ids(self.tokenizer),
        )
        try:
            self.engine.generate([prompt], 1, sampling, on_token=lambda prompt, sample, token: show(answer.add(token)))
        finally:
            show(answer.finish())
            content, calls = parse_assistant(answer.text)
            called = {"tool_calls": [call for call in calls if "error" not in call]} if calls else {}
            self.messages.append({"role": "assistant", "content": content, **called})
            self.turn += 1

    def reset(self) -> None:
        """Forget the dialog."""
        self.messages, self.turn = [], 0

    def _prompt(self) -> tuple[list[int], int]:
        """Tokens of the dialog and how many may follow; the oldest turns go when the context is full."""
        context = self.engine.model.config.max_position_embeddings
        room = min(self.settings.max_tokens, context // 2)
        while True:
            chat = encode_chat(
                self.tokenizer, self.messages, add_generation_prompt=True, default_system=self.settings.system
            )
            if len(chat.ids) + room <= context:
                return chat.ids, room
            if len(self.messages) == 1:
                raise UserError(
                    f"the message has {len(chat.ids)} tokens with its frame; {context - room} fit before an answer"
                )
            del self.messages[: 2 if len(self.messages) > 2 else 1]


def chat(
    directory: Path,
    *,
    source: TextIO = sys.stdin,
    stream: TextIO = sys.stdout,
    settings: ChatSettings | None = None,
    load: Loader = load_export,
) -> None:
    """Talk to the model in a local folder, line by line, until the input ends.

    Raises:
        UserError: the folder holds no model.
    """
    conversation = Conversation(Engine(load(directory)), load_tokenizer(directory), settings or ChatSettings())
    interactive = source.isatty() and stream.isatty()
    if interactive:
        stream.write(f"{HELP}\n")
    while (line := _read(source, stream, interactive)) is not None and line.strip() != "/quit":
        _respond(conversation, line.strip(), stream)


def _respond(conversation: Conversation, line: str, stream: TextIO) -> None:
    """Carry out a command, or answer."""
    if not line:
        return
    if line == "/reset":
        conversation.reset()
        stream.write("(a new conversation)\n")
    elif line.startswith("/"):
        stream.write(f"({HELP})\n")
    else:
        _answer(conversation, line, stream)
    stream.flush()


def _answer(conversation: Conversation, line: str, stream: TextIO) -> None:
    def show(piece: str) -> None:
        stream.write(piece)
        stream.flush()

    try:
        conversation.say(line, show)
    except KeyboardInterrupt:
        stream.write(" (stopped)")
    except UserError as error:
        stream.write(f"({error})")
    stream.write("\n")


def _read(source: TextIO, stream: TextIO, interactive: bool) -> str | None:
    """The next line without its end; None at the end of input and at Ctrl-C."""
    if interactive:
        stream.write("\n> ")
        stream.flush()
    try:
        line = source.readline()
    except KeyboardInterrupt:
        line = ""
    if not line and interactive:
        stream.write("\n")
    return line.rstrip("\n") if line else None
