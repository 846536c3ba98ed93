"""The HTTP server of `k2 serve`: OpenAI's chat completions and Anthropic's messages over one batch.

It listens on loopback unless told otherwise, and wants a key wherever others can reach it.
"""

import hmac
import ipaddress
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from k2.errors import UserError
from k2.serving.anthropic import CountRequest, MessageAnswer, MessagesRequest
from k2.serving.batching import Busy
from k2.serving.openai import ChatCompletion, ChatRequest, models
from k2.serving.service import Question, Service

log = logging.getLogger(__name__)

KEY_VARIABLE = "K2_SERVE_KEY"
LARGEST_BODY = 16 << 20
"""Bytes of a request: a context of a million tokens fits."""

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

Model = TypeVar("Model", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]


def key_for(host: str) -> str | None:
    """The key that requests must send, from the environment.

    Raises:
        UserError: others could reach this host and there is no key.
    """
    key = os.environ.get(KEY_VARIABLE)
    if not key and not _is_loopback(host):
        raise UserError(f"--host {host} lets others in: set {KEY_VARIABLE} to the key that they must send")
    return key


def serve(service: Service, host: str, port: int, key: str | None) -> None:
    """Answer until interrupted; requests under way are finished first, for at most half a minute."""
    uvicorn.run(application(service, key), host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)


def application(service: Service, key: str | None) -> Starlette:
    """The server as an ASGI application. With a `key` every request but /health must send it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.batcher.close()

    api = _Api(service)
    routes = {
        "/v1/models": (api.models, "GET"),
        "/v1/chat/completions": (api.chat_completions, "POST"),
        "/v1/messages": (api.messages, "POST"),
        "/v1/messages/count_tokens": (api.count_tokens, "POST"),
    }
    return Starlette(
        routes=[
            Route("/health", api.health),
            *(
                Route(path, _counted(_guarded(endpoint, key), service.metrics.request), methods=[verb])
                for path, (endpoint, verb) in routes.items()
            ),
        ],
        exception_handlers={HTTPException: _refused, Exception: _failed},
        lifespan=lifespan,
    )


class _Api:
    """What is done for each path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: Request) -> Response:
        failed = self._service.batcher.failure is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def models(self, _: Request) -> Response:
        return JSONResponse(models(self._service))

    async def chat_completions(self, request: Request) -> Response:
        wanted = await self._read(request, ChatRequest)
        completion = ChatCompletion(self._service, wanted, uuid.uuid4().hex, int(time.time()))
        if not wanted.stream:
            return JSONResponse(await completion.whole())
        lines = (f"data: {_json(chunk)}\n\n" async for chunk in completion.chunks())
        return await _stream(lines, lambda error: f"data: {_json(error)}\n\n", "data: [DONE]\n\n")

    async def messages(self, request: Request) -> Response:
        wanted = await self._read(request, MessagesRequest)
        answer = MessageAnswer(self._service, wanted, uuid.uuid4().hex)
        if not wanted.stream:
            return JSONResponse(await answer.whole())
        lines = (_event(kind, {"type": kind} | data) async for kind, data in answer.events())
        return await _stream(lines, lambda error: _event("error", error), "")

    async def count_tokens(self, request: Request) -> Response:
        wanted = await self._read(request, CountRequest)
        return JSONResponse({"input_tokens": len(self._service.encode(Question(**wanted.dialog())))})

    async def _read(self, request: Request, kind: type[Model]) -> Model:
        """The request's body. Raises HTTPException for one that is too large, is no JSON, or says what it must not."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_BODY:
                raise HTTPException(413, f"the request has more than {LARGEST_BODY} bytes")
        try:
            wanted = kind.model_validate_json(body)
        except ValidationError as error:
            raise HTTPException(400, "; ".join(_complaint(each) for each in error.errors()[:3])) from None
        name = getattr(wanted, "model", self._service.name)
        if name != self._service.name:
            raise HTTPException(404, f"model: {name!r} is not served here; {self._service.name!r} is")
        return wanted


def _counted(endpoint: Endpoint, count: Callable[[int], None]) -> Endpoint:
    """The endpoint, each answer's status told to `count`; of a stream it is the one that it began with."""

    async def counted(request: Request) -> Response:
        status = 503
        try:
            response = await endpoint(request)
            status = response.status_code
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            count(status)

    return counted


def _guarded(endpoint: Endpoint, key: str | None) -> Endpoint:
    """The endpoint for those who send the key; errors of the service as HTTP errors."""

    async def guarded(request: Request) -> Response:
        if key and not hmac.compare_digest(_sent_key(request).encode(), key.encode()):
            raise HTTPException(401, "send the key, as `Authorization: Bearer KEY` or `x-api-key: KEY`")
        try:
            return await endpoint(request)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        except Busy:
            raise HTTPException(429, "too many requests are open; try again", {"Retry-After": "1"}) from None

    return guarded


def _sent_key(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


async def _stream(
    lines: AsyncGenerator[str], error_line: Callable[[Mapping[str, Any]], str], last: str
) -> StreamingResponse:
    """A streamed response. What goes wrong before its first line is still an error with a status of its own."""
    first = await anext(lines)

    async def rest() -> AsyncGenerator[str]:
        async with aclosing(lines):
            yield first
            try:
                async for line in lines:
                    yield line
                yield last
            except Exception as error:  # the status has been sent: the error is said in the stream
                log.exception("an answer broke off")
                yield error_line(_error(503, type(error).__name__))

    return StreamingResponse(rest(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(_error(error.status_code, error.detail), error.status_code, error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(_error(503, f"the model cannot answer any more ({type(error).__name__}); see the log"), 503)


def _error(status: int, message: str) -> dict[str, Any]:
    """The body of an error, which clients of both protocols understand."""
    kind = ERROR_TYPES.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": message, "param": None, "code": status}}


def _complaint(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the request"
    return f"{place}: {error['msg']}"


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {_json(data)}\n\n"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
