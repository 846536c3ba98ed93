"""Anthropic's messages: what a request may say, and the shapes of the answers."""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from k2.serving.service import Answer, Ending, Question, Service
from k2.serving.tool_calls import ToolCall

Event = tuple[str, dict[str, Any]]


class _TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class _ToolUse(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def call(self) -> dict[str, Any]:
        """The call as OpenAI spells it."""
        arguments = json.dumps(self.input, ensure_ascii=False, separators=(",", ":"))
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class _ToolResult(BaseModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[_TextBlock] = ""


_Block = Annotated[_TextBlock | _ToolUse | _ToolResult, Field(discriminator="type")]


class _Message(BaseModel):
    role: Literal["user", "assistant"]
    content: str | list[_Block]

    def plain(self) -> Iterator[dict[str, Any]]:
        """The messages it stands for: tool results are messages of their own."""
        blocks = [_TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        for block in blocks:
            if isinstance(block, _ToolResult):
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
        text = "".join(block.text for block in blocks if isinstance(block, _TextBlock))
        calls = [block.call() for block in blocks if isinstance(block, _ToolUse)]
        if text or calls:
            yield {"role": self.role, "content": text} | ({"tool_calls": calls} if calls else {})


class _Tool(BaseModel):
    name: str
    description: str = ""
    input_schema: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """The tool as OpenAI spells it."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class _ToolChoice(BaseModel):
    type: Literal["auto", "none"]


class _Thinking(BaseModel):
    type: Literal["disabled"]


class CountRequest(BaseModel):
    """What a dialog consists of. What would change the answer and is not supported is refused."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    system: str | list[_TextBlock] = ""
    tools: list[_Tool] = []
    tool_choice: _ToolChoice = _ToolChoice(type="auto")
    thinking: _Thinking = _Thinking(type="disabled")

    def dialog(self) -> dict[str, Any]:
        """Messages and tools of the question."""
        system = _text(self.system)
        told = [{"role": "system", "content": system}] if system else []
        said = [plain for message in self.messages for plain in message.plain()]
        tools = [tool.plain() for tool in self.tools] if self.tool_choice.type == "auto" else []
        return {"messages": told + said, "tools": tools}


class MessagesRequest(CountRequest):
    """A request for one message."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    stop_sequences: Annotated[list[str], Field(max_length=16)] = []
    stream: bool = False

    def question(self) -> Question:
        """The request in the terms of no protocol."""
        return Question(
            **self.dialog(),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(each for each in self.stop_sequences if each),
        )


class MessageAnswer:
    """The answer to one request, at once or as events."""

    def __init__(self, service: Service, request: MessagesRequest, number: str) -> None:
        """Check the request; `number` names it.

        Raises:
            UserError: it does not fit.
        """
        self._service, self._question = service, request.question()
        self._prompt = service.encode(self._question)
        self._sampling = service.sampling(self._question, self._prompt)
        self._head = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": service.name}

    async def whole(self) -> dict[str, Any]:
        """The message object."""
        (answer,) = await self._service.answers(self._question, self._prompt, self._sampling)
        assert answer.ending is not None, "answers are complete"
        text = [{"type": "text", "text": answer.text}] if answer.text or not answer.ending.calls else []
        return self._message([*text, *map(_tool_use, answer.ending.calls)], answer.ending, len(answer.tokens))

    async def events(self) -> AsyncGenerator[Event]:
        """The events of a streamed message: one block of text as it comes, then a block for each tool call."""
        answer = Answer()
        async with aclosing(self._service.answer(self._question, self._prompt, self._sampling)) as pieces:
            async for piece in pieces:
                if not answer.tokens:
                    yield "message_start", {"message": self._message([], None, 0)}
                    yield "content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}
                answer.add(piece)
                if piece.text:
                    yield "content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": piece.text}}
        yield "content_block_stop", {"index": 0}
        assert answer.ending is not None, "the last piece has the ending"
        for index, call in enumerate(answer.ending.calls, 1):
            for event in _call_events(index, call):
                yield event
        yield "message_delta", {"delta": _stop(answer.ending), "usage": {"output_tokens": len(answer.tokens)}}
        yield "message_stop", {}

    def _message(self, content: list[dict[str, Any]], ending: Ending | None, produced: int) -> dict[str, Any]:
        usage = {"input_tokens": len(self._prompt), "output_tokens": produced}
        return {**self._head, "content": content, **_stop(ending), "usage": usage}


def _text(content: str | list[_TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _tool_use(call: ToolCall) -> dict[str, Any]:
    function = call["function"]
    return {
        "type": "tool_use",
        "id": call["id"],
        "name": function["name"],
        "input": json.loads(function["arguments"]),
    }


def _call_events(index: int, call: ToolCall) -> Iterator[Event]:
    arguments = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
    yield "content_block_start", {"index": index, "content_block": _tool_use(call) | {"input": {}}}
    yield "content_block_delta", {"index": index, "delta": arguments}
    yield "content_block_stop", {"index": index}


def _stop(ending: Ending | None) -> Mapping[str, Any]:
    if ending is None:
        return {"stop_reason": None, "stop_sequence": None}
    if ending.stopped_by is not None and not ending.calls:
        return {"stop_reason": "stop_sequence", "stop_sequence": ending.stopped_by}
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[ending.reason]
    return {"stop_reason": reason, "stop_sequence": None}
