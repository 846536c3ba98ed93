"""The tool-call parser: exact on what the chat template renders, calm on anything else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.serving.chat_template import compact_json, render
from k2.serving.tool_calls import loads_object, parse_assistant

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_\-]{0,12}", fullmatch=True)
PLAIN = st.text(max_size=20).filter(lambda text: "<|" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | PLAIN, lambda v: st.lists(v) | st.dictionaries(PLAIN, v)
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(PLAIN, VALUES, max_size=3)), max_size=3)


@settings(max_examples=60)
@given(PLAIN, CALLS)
def test_round_trip(content: str, calls: list[tuple[str, dict[str, object]]]) -> None:
    tool_calls = [
        {
            "id": f"functions.{name}:{i}",
            "type": "function",
            "function": {"name": name, "arguments": compact_json(value)},
        }
        for i, (name, value) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content, "tool_calls": tool_calls}
    said = "".join(segment.text for segment in render([message]) if segment.trainable)
    assert parse_assistant(said) == (content, tool_calls)


@given(
    st.lists(
        st.sampled_from(
            [
                "<|tool_calls_section_begin|>",
                "<|tool_call_begin|>",
                "functions.f:0",
                "<|tool_call_argument_begin|>",
                "{",
                "}",
                "text",
                "<|tool_call_end|>",
                "<|tool_calls_section_end|>",
                "<|im_end|>",
            ]
        )
    ).map("".join)
)
def test_nothing_raises_and_whole_calls_are_objects(text: str) -> None:
    _, calls = parse_assistant(text)
    for call in calls:
        if "error" not in call:
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
            assert call["function"]["name"] == "f"


def section(body: str) -> str:
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>[1]<|tool_call_end|>", "not a JSON object"),
        ("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{'a':1}<|tool_call_end|>", "not a JSON object"),
        ("<|tool_call_begin|>functions.f<|tool_call_argument_begin|>{}<|tool_call_end|>", "call id"),
        ('<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a":', "cut off"),
        ("<|tool_call_begin|>functions.f:0<|tool_call_end|>", "cut off"),
    ],
)
def test_malformed_calls_are_reported(body: str, error: str) -> None:
    content, calls = parse_assistant("ok" + section(body))
    assert content == "ok"
    assert len(calls) == 1
    assert error in calls[0]["error"]


def test_cut_off_section_keeps_whole_calls() -> None:
    whole = "<|tool_call_begin|>f-g:3<|tool_call_argument_begin|> {} <|tool_call_end|>"
    _, calls = parse_assistant(f"<|tool_calls_section_begin|>{whole}<|tool_call_begin|>functions.f:4")
    assert [call["id"] for call in calls] == ["functions.f-g:3", "functions.f:4"]
    assert "error" not in calls[0]
    assert calls[1]["error"] == "the call is cut off"


def test_arguments_must_be_an_object() -> None:
    assert loads_object('{"a":1}') == {"a": 1}
    with pytest.raises(ValueError, match="not an object"):
        loads_object("3")
