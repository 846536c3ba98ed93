"""The one protocol for everything that asks a model for text; torch-free."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error"]
StreamCallback = Callable[[int, str], None]


@dataclass(frozen=True)
class GenerationRequest:
    """One conversation to continue by one assistant message.

    `messages` and `tools` are OpenAI-style dicts. `max_tokens` bounds the answer in tokens of the model.
    `temperature` 0 is greedy. `seed` fixes the sampling of this request alone: equal requests get equal
    answers. Generation ends before the first of the `stop` strings, which is not part of the answer.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt and of the answer, as the backend counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """The answer to one request.

    `token_ids` and `logprobs` (natural logarithm, one per token, under the sampling policy at temperature 1)
    are empty where a backend does not reveal them. `tool_calls` are OpenAI-style dicts where the backend
    parses calls itself. `finish_reason` "error" marks a request that failed alone; its text is the reason.
    """

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    finish_reason: FinishReason = "stop"
    usage: Usage = field(default_factory=Usage)
    tool_calls: Sequence[Mapping[str, Any]] = ()


class Generator(Protocol):
    """A model that continues conversations."""

    @property
    def identity(self) -> str:
        """What decides the answers besides the request (model, weights digest); cache keys contain it."""

    def generate(
        self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None
    ) -> list[Completion]:
        """Answer every request, in order. `stream(index, text)` receives pieces of text as they appear."""
