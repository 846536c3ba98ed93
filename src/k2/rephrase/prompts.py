"""What the rewriting model is asked: several styles and perspectives for knowledge, learning notes for mathematics.

K2 gives no prompt texts (report section 2.2); these are our own, short enough for a model of 135M parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from k2.generation.protocol import Message


@dataclass(frozen=True)
class Style:
    """How a rewrite sounds (`style`), for whom it is written (`perspective`), and the instruction that asks for it."""

    style: str
    perspective: str
    instruction: str

    @property
    def name(self) -> str:
        return f"{self.style}/{self.perspective}"


KNOWLEDGE = (
    Style("plain", "general reader", "Paraphrase the following text in your own words."),
    Style("encyclopedic", "editor", "Paraphrase the following text in the neutral style of an encyclopedia."),
    Style("concise", "practitioner", "Paraphrase the following text in short, direct sentences."),
    Style("formal", "technical writer", "Rewrite the following text to make it more professional and formal."),
)
MATHEMATICS = (
    Style("learning note", "student", "Paraphrase the following text as a short study note in your own words."),
    Style("learning note", "tutor", "Paraphrase the following text as a tutor's note. Keep all formulas and steps."),
)


def style_for(domain: str, position: int) -> Style:
    """The style of the rewrite at `position`: neighbours, and two rewrites of one document, differ in style."""
    styles = MATHEMATICS if domain == "math" else KNOWLEDGE
    return styles[position % len(styles)]


@dataclass(frozen=True)
class Turn:
    """A chunk that came before: its source, and its rewrite, or None when none was accepted."""

    source: str
    rewrite: str | None


def messages(style: Style, chunk: str, history: Sequence[Turn]) -> list[Message]:
    """The conversation that asks for a rewrite of `chunk` after `history`.

    A rewritten chunk appears as a turn of the conversation, so the model sees the source so far and its own text
    so far and goes on in the same voice. A chunk that was not rewritten is shown as text that precedes the next.
    """
    conversation: list[Message] = []
    before = ""
    for turn in history:
        if turn.rewrite is None:
            before += turn.source
            continue
        conversation.append({"role": "user", "content": _ask(style, before, turn.source)})
        conversation.append({"role": "assistant", "content": turn.rewrite})
        before = ""
    return [*conversation, {"role": "user", "content": _ask(style, before, chunk)}]


def _ask(style: Style, before: str, chunk: str) -> str:
    context = f"Earlier in the document, not to be rewritten:\n{before.strip()}\n\n" if before.strip() else ""
    return f"{context}{style.instruction}\n\n{chunk.strip()}"
