"""OpenAI's chat completions: what a request may say, and the shapes of the answers."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from k2.data.tokenizer import Tokenizer
from k2.serving.batching import Token
from k2.serving.service import Answer, Piece, Question, Service
from k2.serving.tool_calls import ToolCall


class TextPart(BaseModel):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class _Function(BaseModel):
    name: str
    arguments: str


class _Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: _Function


class ChatMessage(BaseModel):
    """One message of the dialog."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _results_say_of_what(self) -> "ChatMessage":
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs tool_call_id")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as the chat format takes it."""
        message = self.model_dump(exclude_none=True)
        return message | {"role": "system"} if self.role == "developer" else message


class _Tool(BaseModel):
    type: Literal["function"]
    function: dict[str, Any]

    @field_validator("function")
    @classmethod
    def _has_a_name(cls, function: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(function.get("name"), str):
            raise ValueError("a tool's function needs a name")
        return function


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Text(BaseModel):
    type: Literal["text"]


class ChatRequest(BaseModel):
    """A request. What would change the answer and is not supported is refused; what would not is ignored."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[_Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=64)] = 1
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    logprobs: bool = False
    top_logprobs: Literal[0] = 0
    response_format: _Text | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    def question(self) -> Question:
        """The request in the terms of no protocol."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return Question(
            messages=[message.plain() for message in self.messages],
            tools=[tool.model_dump() for tool in self.tools] if self.tool_choice == "auto" else [],
            n=self.n,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(each for each in stop if each),
        )


def models(service: Service) -> dict[str, Any]:
    """The list of models, which is one."""
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "k2", "max_model_len": service.context}
    return {"object": "list", "data": [model]}


class ChatCompletion:
    """The answers to one request, at once or in chunks."""

    def __init__(self, service: Service, request: ChatRequest, number: str, created: int) -> None:
        """Check the request; `number` names it.

        Raises:
            UserError: it does not fit.
        """
        self._service, self._request, self._question = service, request, request.question()
        self._prompt = service.encode(self._question)
        self._sampling = service.sampling(self._question, self._prompt)
        self._head = {"id": f"chatcmpl-{number}", "created": created, "model": service.name}

    async def whole(self) -> dict[str, Any]:
        """The completion object."""
        answers = await self._service.answers(self._question, self._prompt, self._sampling)
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage(sum(len(answer.tokens) for answer in answers)),
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed completion: roles, text as it comes, tool calls when they are whole, the usage."""
        begun: set[int] = set()
        produced = 0
        async with aclosing(self._service.answer(self._question, self._prompt, self._sampling)) as pieces:
            async for piece in pieces:
                produced += 1
                if piece.sample not in begun:
                    begun.add(piece.sample)
                    yield self._chunk([_delta(piece.sample, {"role": "assistant", "content": ""})])
                for choice in self._deltas(piece):
                    yield self._chunk([choice])
        if self._request.stream_options.include_usage:
            yield self._chunk([]) | {"usage": self._usage(produced)}

    def _deltas(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.text or self._request.logprobs:
            yield _delta(piece.sample, {"content": piece.text}, logprobs=self._logprobs([piece.token]))
        if piece.ending is not None:
            calls = [{"index": i, **call} for i, call in enumerate(piece.ending.calls)]
            yield _delta(piece.sample, {"tool_calls": calls} if calls else {}, piece.ending.reason)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.ending is not None, "answers are complete"
        calls: list[ToolCall] = answer.ending.calls
        message = {"role": "assistant", "content": answer.text or (None if calls else "")}
        return {
            "index": index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "finish_reason": answer.ending.reason,
            "logprobs": self._logprobs(answer.tokens),
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return {"content": [_logprob(self._service.tokenizer, token) for token in tokens]}

    def _usage(self, produced: int) -> dict[str, int]:
        asked = len(self._prompt)
        return {"prompt_tokens": asked, "completion_tokens": produced, "total_tokens": asked + produced}


def _delta(
    index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}


def _logprob(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    text = tokenizer.decode([token.token])
    return {"token": text, "logprob": token.logprob, "bytes": list(text.encode()), "top_logprobs": []}
