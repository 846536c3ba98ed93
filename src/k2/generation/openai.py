"""Any OpenAI-compatible chat-completions endpoint, asked concurrently and with patience."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx

from k2.config.generator import GeneratorConfig
from k2.errors import StageError, UserError
from k2.generation.protocol import Completion, GenerationRequest, StreamCallback, Usage

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


class Endpoint:
    """A `Generator` over HTTP. Answers are as reproducible as the server honours `seed`."""

    def __init__(self, config: GeneratorConfig, url: str | None, key: str | None) -> None:
        """Talk to `url` (up to and including /v1). Raises UserError when there is none."""
        if not url:
            raise UserError("generator.url: backend endpoint needs a URL; set K2_LLM_ENDPOINT or generator.url")
        self.config = config
        self.identity = f"endpoint:{config.model}"
        self.public_url = _without_credentials(url)
        limits = httpx.Limits(max_connections=config.concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(
            base_url=url.rstrip("/") + "/", timeout=config.timeout_s, limits=limits, headers=headers
        )

    def generate(
        self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None
    ) -> list[Completion]:
        """Answer every request, in order; `stream` receives each answer in one piece when it is complete.

        Raises UserError when the endpoint cannot be reached, refuses the key, or does not accept the request, and
        StageError when it keeps failing after all retries.
        """

        def answer(index: int) -> Completion:
            completion = self._answer(requests[index])
            if stream is not None:
                stream(index, completion.text)
            return completion

        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            return list(pool.map(answer, range(len(requests))))
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, request: GenerationRequest) -> Completion:
        body = _body(self.config.model, request)
        failure = ""
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(_wait_s(attempt))
            try:
                response = self.client.post("chat/completions", json=body)
            except httpx.ConnectError as error:
                failure = f"cannot be reached ({type(error).__name__})"
                continue
            except httpx.TransportError as error:
                failure = f"broke off ({type(error).__name__})"
                continue
            if response.status_code == 429 or response.status_code >= 500:
                failure = f"answered {response.status_code}"
                continue
            self._refuse(response)
            return _parse(response.json())
        raise self._exhausted(failure)

    def _refuse(self, response: httpx.Response) -> None:
        if response.status_code in (401, 403):
            raise UserError(f"{self.public_url} refused the key ({response.status_code}); set K2_LLM_API_KEY")
        if response.status_code >= 300:
            raise UserError(
                f"{self.public_url} did not accept the request for model {self.config.model!r} "
                f"({response.status_code}): {response.text[:200]!r}; check generator.model and the URL's path (/v1)"
            )

    def _exhausted(self, failure: str) -> Exception:
        tries = self.config.retries + 1
        if failure.startswith("cannot be reached"):
            return UserError(
                f"{self.public_url} {failure} after {tries} attempts; start the server, correct K2_LLM_ENDPOINT, "
                "or use the embedded generator (generator.backend: embedded)"
            )
        return StageError(f"{self.public_url} {failure}, {tries} attempts; run again to continue where it stopped")


def _body(model: str, request: GenerationRequest) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [dict(message) for message in request.messages],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    optional = {"tools": [dict(tool) for tool in request.tools], "stop": list(request.stop)}
    return body | {name: value for name, value in optional.items() if value}


def _parse(answer: Any) -> Completion:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return Completion(
        text=choice["message"].get("content") or "",
        logprobs=tuple(token["logprob"] for token in tokens),
        finish_reason=choice.get("finish_reason") or "stop",
        usage=Usage(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)),
        tool_calls=tuple(choice["message"].get("tool_calls") or ()),
    )


def _wait_s(attempt: int) -> float:
    """Exponential backoff with full jitter: clients that failed together do not come back together."""
    return random.uniform(0.5, 1.0) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (attempt - 1))


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
