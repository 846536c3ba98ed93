"""What of an answer is shown when, against the whole text known at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.data.tokenizer import Tokenizer
from k2.serving.answer import AnswerText
from k2.serving.chat_template import (
    IM_END,
    TOOL_ARGUMENT_BEGIN,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_SECTION_BEGIN,
    TOOL_SECTION_END,
)
from k2.serving.tool_calls import parse_assistant

TOKENIZER = Tokenizer.train(["naïve café — hello world, how are you?"] * 5, 600)


def pieces(answer: AnswerText, ids: list[int]) -> list[str]:
    return [*(answer.add(token) for token in ids), answer.finish()]


@given(st.text(max_size=40))
def test_pieces_make_the_text(text: str) -> None:
    answer = AnswerText(TOKENIZER)
    assert "".join(pieces(answer, TOKENIZER.encode(text))) == text == answer.text


def test_a_character_of_several_tokens_is_shown_once_it_is_whole() -> None:
    ids = TOKENIZER.encode("日本語")
    assert len(ids) > len("日本語")
    shown = pieces(AnswerText(TOKENIZER), [*ids, TOKENIZER.special[IM_END]])
    assert "".join(shown) == "日本語"
    assert not any("\ufffd" in piece for piece in shown)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_an_answer_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    answer = AnswerText(TOKENIZER, stop)
    shown = "".join(pieces(answer, TOKENIZER.encode(text)))
    # By letters: the first end of a stop string ends the answer where the earliest string that is there begins.
    ends = [end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)]
    expected = text[: min(text[: ends[0]].find(s) for s in stop if s in text[: ends[0]])] if ends else text
    assert (shown, answer.stopped_by is not None) == (expected, bool(ends))


def test_nothing_that_may_begin_a_stop_string_is_shown_early() -> None:
    answer = AnswerText(TOKENIZER, ["world"])
    assert "".join(answer.add(token) for token in TOKENIZER.encode("hello wor")) == "hello "
    assert answer.finish() == "wor"
    assert answer.stopped_by is None


@pytest.mark.parametrize("after", ["", " done"])
def test_tool_calls_are_kept_and_not_shown(after: str) -> None:
    special = TOKENIZER.special
    call = [special[TOOL_CALL_BEGIN], *TOKENIZER.encode("functions.add:0"), special[TOOL_ARGUMENT_BEGIN]]
    call += [*TOKENIZER.encode('{"a": 1}'), special[TOOL_CALL_END]]
    section = [special[TOOL_SECTION_BEGIN], *call, special[TOOL_SECTION_END]]
    answer = AnswerText(TOKENIZER, ['a": 1'], hide_calls=True)
    ids = [*TOKENIZER.encode("hello"), *section, *TOKENIZER.encode(after), special[IM_END]]
    assert "".join(pieces(answer, ids)) == f"hello{after}"
    content, calls = parse_assistant(answer.text)
    assert content == f"hello{after}"
    assert [c["function"] for c in calls] == [{"name": "add", "arguments": '{"a": 1}'}]
