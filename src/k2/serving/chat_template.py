"""Kimi K2's chat format: messages and tools to tokens, with the mask of what the model itself has said.

One dialog is a sequence of contiguous turns, with no separator, no [BOS] and no [EOS]:

    <|im_system|>tool_declare<|im_middle|>{tools as compact JSON with sorted keys}<|im_end|>
    <|im_system|>system<|im_middle|>{system prompt}<|im_end|>
    <|im_user|>user<|im_middle|>{text}<|im_end|>
    <|im_assistant|>assistant<|im_middle|>{text}<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}
        <|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|><|im_end|>
    <|im_system|>tool<|im_middle|>## Return of functions.{name}:{index}\\n{result}<|im_end|>

`index` counts all calls of the dialog from 0 (Kimi K2 report, appendix B; tokens as in the released tokenizer).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

IM_END = "<|im_end|>"
IM_MIDDLE = "<|im_middle|>"
IM_SYSTEM = "<|im_system|>"
IM_ASSISTANT = "<|im_assistant|>"
TOOL_SECTION_BEGIN = "<|tool_calls_section_begin|>"
TOOL_SECTION_END = "<|tool_calls_section_end|>"
TOOL_CALL_BEGIN = "<|tool_call_begin|>"
TOOL_ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
TOOL_CALL_END = "<|tool_call_end|>"

ROLE_TOKENS = {"user": "<|im_user|>", "assistant": IM_ASSISTANT}  # every other role is <|im_system|>
DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class ChatTokenizer(Protocol):
    """What the chat format needs of a tokenizer; `k2.data.tokenizer.Tokenizer` is one."""

    @property
    def special(self) -> Mapping[str, int]:
        """Ids of the special tokens by their spelling."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; spellings of special tokens inside it stay text."""


@dataclass(frozen=True)
class Segment:
    """A run of text, or one special token; `trainable` when the assistant produced it."""

    text: str
    special: bool = False
    trainable: bool = False


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a dialog, and for each whether the loss may teach it."""

    ids: list[int]
    assistant_mask: list[bool]


def compact_json(value: Any) -> str:
    """JSON without spaces, in the order given: the spelling of arguments and results."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def content_text(content: Any) -> str:
    """Text of a message's `content`: a string, None, or a list of parts of which the text parts count."""
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part["text"] for part in content if part["type"] == "text")


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    *,
    add_generation_prompt: bool = False,
    default_system: str | None = DEFAULT_SYSTEM,
) -> list[Segment]:
    """The dialog as segments, special tokens apart from text so that no text can forge one.

    `default_system` is said when the first message is not a system message; None says nothing, and a system message
    with empty content leaves the system turn out. Ids of tool calls are rewritten to `functions.{name}:{index}`, for
    the results that refer to them too.
    """
    segments: list[Segment] = []
    if tools:
        segments += _turn(IM_SYSTEM, "tool_declare", _declaration(tools))
    if default_system and (not messages or messages[0]["role"] != "system"):
        segments += _turn(IM_SYSTEM, "system", default_system)
    ids: dict[str, str] = {}
    index = 0
    for message in messages:
        calls = _numbered(message, index)
        ids |= {call["id"]: call_id for call_id, call in calls}
        index += len(calls)
        segments += _message(message, calls, ids)
    if add_generation_prompt:
        segments += _header(IM_ASSISTANT, "assistant")
    return segments


def encode_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    *,
    add_generation_prompt: bool = False,
    default_system: str | None = DEFAULT_SYSTEM,
) -> EncodedChat:
    """Tokens of `render`; the mask covers what the assistant wrote, its tool calls and its closing <|im_end|>."""
    ids: list[int] = []
    mask: list[bool] = []
    for segment in render(messages, tools, add_generation_prompt=add_generation_prompt, default_system=default_system):
        piece = [tokenizer.special[segment.text]] if segment.special else tokenizer.encode(segment.text)
        ids += piece
        mask += [segment.trainable] * len(piece)
    return EncodedChat(ids, mask)


def _declaration(tools: Sequence[Tool]) -> str:
    """Keys are sorted, so that equal tools read the same however a client or a file orders them."""
    return json.dumps(list(tools), ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _numbered(message: Message, start: int) -> list[tuple[str, Mapping[str, Any]]]:
    calls = message.get("tool_calls") or []
    return [(f"functions.{call['function']['name']}:{start + i}", call) for i, call in enumerate(calls)]


def _message(message: Message, calls: Sequence[tuple[str, Mapping[str, Any]]], ids: Mapping[str, str]) -> list[Segment]:
    role = message["role"]
    text = content_text(message.get("content"))
    if role == "system" and not text:
        return []
    name = message.get("name") or role
    if role == "tool":
        called = message["tool_call_id"]
        text = f"## Return of {ids.get(called, called)}\n{text}"
    if role != "assistant":
        return _turn(ROLE_TOKENS.get(role, IM_SYSTEM), name, text)
    said = [Segment(text), *_calls(calls), Segment(IM_END, special=True)]
    return [*_header(IM_ASSISTANT, name), *(Segment(s.text, s.special, True) for s in said if s.text)]


def _calls(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Segment]:
    if not calls:
        return
    yield Segment(TOOL_SECTION_BEGIN, special=True)
    for call_id, call in calls:
        arguments = call["function"]["arguments"]
        yield Segment(TOOL_CALL_BEGIN, special=True)
        yield Segment(call_id)
        yield Segment(TOOL_ARGUMENT_BEGIN, special=True)
        yield Segment(arguments if isinstance(arguments, str) else compact_json(arguments))
        yield Segment(TOOL_CALL_END, special=True)
    yield Segment(TOOL_SECTION_END, special=True)


def _header(role_token: str, name: str) -> list[Segment]:
    return [Segment(role_token, special=True), Segment(name), Segment(IM_MIDDLE, special=True)]


def _turn(role_token: str, name: str, text: str) -> list[Segment]:
    body = [Segment(text)] if text else []
    return [*_header(role_token, name), *body, Segment(IM_END, special=True)]


# The same format for Hugging Face tokenizers (`chat_template` in tokenizer_config.json). It renders to one string, so
# unlike `encode_chat` it cannot keep special-token spellings inside user text apart.
_JINJA = """
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(index=0, ids={}) -%}
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}<|im_end|>
{%- endif -%}
{%- set default_system = DEFAULT_SYSTEM -%}
{%- if default_system and (not messages or messages[0]['role'] != 'system') -%}
<|im_system|>system<|im_middle|>{{ default_system }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- set role = message['role'] -%}
{%- set said = text(message['content']) -%}
{%- if role != 'system' or said -%}
{%- if role == 'user' -%}<|im_user|>
{%- elif role == 'assistant' -%}<|im_assistant|>
{%- else -%}<|im_system|>
{%- endif -%}
{{ message['name'] or role }}<|im_middle|>
{%- if role == 'tool' -%}
{{ '## Return of ' + ns.ids.get(message['tool_call_id'], message['tool_call_id']) + '\\n' }}
{%- endif -%}
{{ said }}
{%- if message['tool_calls'] -%}
<|tool_calls_section_begin|>
{%- for call in message['tool_calls'] -%}
{%- set id = 'functions.' + call['function']['name'] + ':' + ns.index | string -%}
{%- set ns.ids = dict(ns.ids, **{call['id']: id}) -%}
{%- set ns.index = ns.index + 1 -%}
{%- set arguments = call['function']['arguments'] -%}
<|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>
{%- if arguments is string -%}{{ arguments }}{%- else -%}{{ arguments | tojson(separators=(',', ':')) }}{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""


def jinja_template(default_system: str | None = DEFAULT_SYSTEM) -> str:
    """The format as a Jinja template for tokenizer_config.json, with `default_system` written into it."""
    return _JINJA.strip().replace("DEFAULT_SYSTEM", compact_json(default_system or ""))


CHAT_TEMPLATE = jinja_template()
