"""What the rewriting model is asked: several styles and perspectives for knowledge, learning notes for mathematics.

K2 gives no prompt texts (report section 2.2); these are our own, short enough for a model of 135M parameters.
"""

from collections.abc import Iterable, Sequence
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
    Style("encyclopedic", "editor", "Rephrase the following text as an encyclopedia would put it."),
    Style("concise", "practitioner", "Paraphrase the following text in short, direct sentences."),
    Style("reference", "technical writer", "Reword the following text for a reference manual, in your own words."),
)
MATHEMATICS = (
    Style("learning note", "student", "Paraphrase the following text as a short study note in your own words."),
    Style("learning note", "tutor", "Rephrase the following text in your own words, as a note of a tutor."),
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

    The system message shows the source so far and, once a part of it was rewritten, the text so far, so that the
    model goes on in the same voice. As earlier turns of the conversation the same text halves what is accepted:
    a small model then repeats its last answer.
    """
    question: Message = {"role": "user", "content": f"{style.instruction}\n\n{chunk.strip()}"}
    if not history:
        return [question]
    context = "You rewrite a document part by part.\nThe part before: " + _joined(turn.source for turn in history)
    if any(turn.rewrite for turn in history):
        context += "\nYour rewrite of it: " + _joined(turn.rewrite or turn.source for turn in history)
    return [{"role": "system", "content": context}, question]


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(part.strip() for part in parts)
