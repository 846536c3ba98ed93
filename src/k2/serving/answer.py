"""Tokens of an answer to text, as they come."""

from collections.abc import Iterator, Sequence

from k2.data.tokenizer import Tokenizer
from k2.serving.chat_template import IM_END, TOOL_SECTION_BEGIN, TOOL_SECTION_END

END_TOKENS = (IM_END, "[EOS]")


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer."""
    return tuple(tokenizer.special[name] for name in END_TOKENS)


class AnswerText:
    """What may be shown of an answer so far: no half characters, nothing from the first stop string on.

    Attributes:
        text: the whole answer with its tool calls, as far as `add` and `finish` have shown it or kept it back as calls.
        stopped_by: the stop string that ended it, if one did.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, hide_calls: bool = False) -> None:
        """With `hide_calls` tool-call sections are not shown; they are in `text`."""
        self._tokenizer, self._stop, self._hide_calls = tokenizer, tuple(stop), hide_calls
        self._ends = frozenset(end_ids(tokenizer))
        self._section = {tokenizer.special[TOOL_SECTION_BEGIN]: True, tokenizer.special[TOOL_SECTION_END]: False}
        self._half_ids: list[int] = []
        self._held = ""
        self._calling = False
        self.text = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> str:
        """The text that can be shown now."""
        if token in self._ends or self.stopped_by is not None:
            return ""
        if self._hide_calls and (self._calling or token in self._section):
            return self._call(token)
        self._half_ids.append(token)
        text = self._tokenizer.decode(self._half_ids)
        if text.endswith("\ufffd"):
            return ""
        self._half_ids.clear()
        return self._show(text, last=False)

    def finish(self) -> str:
        """What was held back and is shown now that nothing follows."""
        text = self._tokenizer.decode(self._half_ids)
        self._half_ids.clear()
        return self._show(text, last=True)

    def _call(self, token: int) -> str:
        """Keep a token of a tool-call section out of sight; what was held back before the section is shown."""
        shown = "" if self._calling else self.finish()
        if self.stopped_by is None:
            self._calling = self._section.get(token, True)
            self.text += self._tokenizer.decode([token])
        return shown

    def _show(self, text: str, *, last: bool) -> str:
        self._held += text
        found = min(self._places(), default=None)
        if found is not None:
            place, self.stopped_by = found
            shown, self._held = self._held[:place], ""
        else:
            keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            shown = self._held[: len(self._held) - keep]
            self._held = self._held[len(shown) :]
        self.text += shown
        return shown

    def _places(self) -> Iterator[tuple[int, str]]:
        return ((place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
