"""Read tool calls back out of what the assistant wrote.

The grammar is the released one (tool_call_guidance.md): `<|tool_call_begin|>functions.{name}:{index}
<|tool_call_argument_begin|>{JSON}<|tool_call_end|>` inside a tool-calls section, with three kindnesses to models:
names may hold hyphens, the `functions.` prefix may be missing, and a section cut off by the token limit still yields
the calls that are whole.
"""

import json
import re
from collections.abc import Iterator
from typing import NotRequired, TypedDict

from k2.serving.chat_template import (
    IM_END,
    TOOL_ARGUMENT_BEGIN,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_SECTION_BEGIN,
    TOOL_SECTION_END,
)

_SECTION = re.compile(f"{re.escape(TOOL_SECTION_BEGIN)}(.*?)(?:{re.escape(TOOL_SECTION_END)}|$)", re.DOTALL)
_CALL_ID = re.compile(r"(?:functions\.)?(?P<name>[\w.\-]+):(?P<index>\d+)")


class Function(TypedDict):
    """Name of the tool and its arguments, a JSON object as the model spelled it."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call in OpenAI's shape. `error` is there only when the call is malformed and must not be executed."""

    id: str
    type: str
    function: Function
    error: NotRequired[str]


def parse_assistant(text: str) -> tuple[str, list[ToolCall]]:
    """Split one assistant turn into the text outside tool-call sections and the calls, in order.

    Never raises: a malformed call is returned with `error` saying what is wrong with it.
    """
    said = text.split(IM_END, 1)[0]
    calls = [call for section in _SECTION.finditer(said) for call in _section_calls(section.group(1))]
    return _SECTION.sub("", said), calls


def loads_object(arguments: str) -> dict[str, object]:
    """The arguments of a call as a dict. Raises ValueError when they are not one JSON object."""
    value = json.loads(arguments)
    if not isinstance(value, dict):
        raise ValueError(f"arguments are a JSON {type(value).__name__}, not an object")
    return value


def _section_calls(section: str) -> Iterator[ToolCall]:
    for piece in section.split(TOOL_CALL_BEGIN)[1:]:
        body, closed, _ = piece.partition(TOOL_CALL_END)
        yield _call(body, complete=bool(closed))


def _call(body: str, *, complete: bool) -> ToolCall:
    call_id, separator, arguments = (part.strip() for part in body.partition(TOOL_ARGUMENT_BEGIN))
    match = _CALL_ID.fullmatch(call_id)
    name = match["name"] if match else ""
    call: ToolCall = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    if match:
        call["id"] = f"functions.{name}:{match['index']}"
    error = _error(arguments, named=bool(match), complete=complete and bool(separator))
    if error:
        call["error"] = error
    return call


def _error(arguments: str, *, named: bool, complete: bool) -> str:
    if not complete:
        return "the call is cut off"
    if not named:
        return "the call id is not functions.{name}:{index}"
    try:
        loads_object(arguments)
    except (ValueError, RecursionError) as error:
        return f"the arguments are not a JSON object: {error}"
    return ""
