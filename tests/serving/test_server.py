"""The server over real HTTP, asked by the project's own client and by hand, with a real (untrained) model."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from k2.config.generator import GeneratorConfig
from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.generation.openai import Endpoint
from k2.generation.protocol import GenerationRequest
from k2.model.generate import Engine
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer
from k2.monitoring.metrics import REGISTRY
from k2.serving.answer import end_ids
from k2.serving.chat_template import (
    TOOL_ARGUMENT_BEGIN,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_SECTION_BEGIN,
    encode_chat,
)
from k2.serving.server import application, key_for
from k2.serving.service import Service
from tests.serving.small import shape

CONFIG, KEY = shape(256), "a key of the test"
HELLO = [{"role": "user", "content": "hello world"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@dataclass
class Running:
    """A server, and what it serves."""

    url: str
    service: Service
    client: httpx.Client

    def chat(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO} | fields)

    def messages(self, **fields: Any) -> httpx.Response:
        asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12}
        return self.client.post("/v1/messages", json=asked | fields)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["naïve café — hello world, how are you?"] * 5, 600)


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    engine = Engine(Transformer(CONFIG).initialize(0))
    service = Service("tiny", engine, tokenizer, rows=4, context=None, system=None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        running = uvicorn.Server(uvicorn.Config(application(service, KEY), log_level="warning"))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
            while not running.started:
                time.sleep(0.01)
            yield Running(url, service, client)
        running.should_exit = True
        thread.join()


def expected(server: Running, tokenizer: Tokenizer, max_tokens: int, **sampling: Any) -> tuple[str, list[float]]:
    """What the engine says to HELLO when it is asked alone."""
    prompt = encode_chat(tokenizer, HELLO, add_generation_prompt=True, default_system=None).ids
    engine = Engine(Transformer(CONFIG).initialize(0))
    config = SamplingConfig(max_tokens, stop_ids=end_ids(tokenizer), **sampling)
    sample = engine.generate([prompt], 1, config)[0][0]
    return tokenizer.decode([t for t in sample.token_ids if t not in end_ids(tokenizer)]), sample.policy_logprobs


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_the_projects_own_client_gets_the_engines_answers(
    server: Running, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GeneratorConfig(backend="endpoint", model="tiny", retries=0)
    requests = [GenerationRequest(HELLO, max_tokens=20, temperature=t, seed=7) for t in (0.0, 1.0)] * 4
    endpoint = Endpoint(config, f"{server.url}/v1", KEY)
    with endpoint.client:
        answers = endpoint.generate(requests)
    for answer, request in zip(answers, requests, strict=True):
        text, logprobs = expected(server, tokenizer, 20, temperature=request.temperature, seed=7)
        assert answer.text == text
        assert answer.usage.completion_tokens == len(logprobs)


def test_log_probabilities_are_the_models(server: Running, tokenizer: Tokenizer) -> None:
    (choice,) = server.chat(max_tokens=9, temperature=0.7, seed=3, logprobs=True).json()["choices"]
    _, logprobs = expected(server, tokenizer, 9, temperature=0.7, seed=3)
    assert [token["logprob"] for token in choice["logprobs"]["content"]] == pytest.approx(logprobs, abs=1e-4)
    assert choice["finish_reason"] == ("length" if len(logprobs) == 9 else "stop")


def test_a_streamed_completion_is_the_whole_one_in_pieces(server: Running) -> None:
    fields = {"max_tokens": 16, "seed": 5, "n": 3, "stop": ["wor"]}
    whole = server.chat(**fields).json()
    chunks = events(server.chat(**fields, stream=True, stream_options={"include_usage": True}).text)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) > 1


def test_a_stop_string_ends_the_answer(server: Running, tokenizer: Tokenizer) -> None:
    text, _ = expected(server, tokenizer, 40, temperature=0.0)
    stop = text[3:5]
    (choice,) = server.chat(max_tokens=40, temperature=0, stop=stop).json()["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    answer = server.messages(max_tokens=40, temperature=0, stop_sequences=[stop]).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)


def test_many_at_once_get_what_each_gets_alone(server: Running) -> None:
    seeds = list(range(24))
    alone = [server.chat(max_tokens=4 + seed % 5, seed=seed).json()["choices"] for seed in seeds]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda seed: server.chat(max_tokens=4 + seed % 5, seed=seed).json()["choices"], seeds))
    assert together == alone


def test_without_a_seed_answers_differ(server: Running) -> None:
    texts = {server.chat(max_tokens=12).json()["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(texts) > 1


def test_who_leaves_frees_the_row(server: Running) -> None:
    with server.client.stream(
        "POST", "/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "stream": True, "n": 8, "seed": 1}
    ) as response:
        next(response.iter_lines())
    started = time.monotonic()
    while server.service.batcher._session.busy and time.monotonic() < started + 30:
        time.sleep(0.01)
    assert not server.service.batcher._session.busy
    assert not server.service.batcher._requests


def test_anthropics_messages(server: Running, tokenizer: Tokenizer) -> None:
    text, logprobs = expected(server, tokenizer, 12, temperature=0.0)
    answer = server.messages(temperature=0).json()
    assert answer["content"] == [{"type": "text", "text": text}]
    assert answer["usage"]["output_tokens"] == len(logprobs)
    told = events(server.messages(temperature=0, stream=True).text)
    assert [told[0]["type"], told[-1]["type"]] == ["message_start", "message_stop"]
    assert "".join(e["delta"]["text"] for e in told if e["type"] == "content_block_delta") == text
    assert told[-2]["delta"]["stop_reason"] == answer["stop_reason"]
    count = server.client.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": HELLO}).json()
    assert count["input_tokens"] == answer["usage"]["input_tokens"]


def test_both_protocols_say_the_same_dialog_to_the_model(server: Running) -> None:
    call = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    openai = [
        {"role": "system", "content": "be brief"},
        *HELLO,
        {"role": "assistant", "content": "so", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}]},
    ]
    use = {"type": "tool_use", "id": "functions.add:0", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "functions.add:0", "content": [{"type": "text", "text": "2"}]}
    anthropic = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "so"}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    function = TOOL["function"] | {"description": ""}  # type: ignore[operator]
    asked = server.chat(messages=openai, tools=[TOOL | {"function": function}], max_tokens=1).json()
    tool = {"name": "add", "input_schema": {"type": "object"}}
    counted = server.messages(messages=anthropic, system="be brief", tools=[tool], max_tokens=1).json()
    assert asked["usage"]["prompt_tokens"] == counted["usage"]["input_tokens"]


def test_a_tool_call_comes_back_as_one(server: Running, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are put into the model's mouth; an untrained one calls no tools."""
    special = tokenizer.special
    said = [*tokenizer.encode("hello"), special[TOOL_SECTION_BEGIN], special[TOOL_CALL_BEGIN]]
    said += [*tokenizer.encode("functions.add:0"), special[TOOL_ARGUMENT_BEGIN], *tokenizer.encode('{"a":1}')]
    said += [special[TOOL_CALL_END], end_ids(tokenizer)[0]]
    session = server.service.batcher._session
    record = type(session)._record

    def scripted(self: Any, row: Any, token: int, *rest: float) -> bool:
        return record(self, row, said[len(row.sample.token_ids)], *rest)

    monkeypatch.setattr(type(session), "_record", scripted)
    (choice,) = server.chat(tools=[TOOL]).json()["choices"]
    call = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "hello")
    assert choice["message"]["tool_calls"] == [call]
    streamed = events(server.chat(tools=[TOOL], stream=True).text)
    assert streamed[-1]["choices"][0]["delta"]["tool_calls"] == [{"index": 0} | call]
    tool = {"name": "add", "input_schema": {"type": "object"}}
    answer = server.messages(tools=[tool], max_tokens=60).json()
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"][1] == {"type": "tool_use", "id": "functions.add:0", "name": "add", "input": {"a": 1}}
    told = events(server.messages(tools=[tool], max_tokens=60, stream=True).text)
    assert json.loads(told[-4]["delta"]["partial_json"]) == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "status", "complaint"),
    [
        ({"model": "other"}, 404, "model: 'other' is not served here; 'tiny' is"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "tool", "content": "2"}]}, 400, "messages.0: Value error, a tool message needs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
        ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type: Input should be 'text'"),
        ({"tool_choice": "required"}, 400, "tool_choice: Input should be 'auto' or 'none'"),
        ({"top_logprobs": 4}, 400, "top_logprobs"),
        ({"max_tokens": 300}, 400, "together at most 256"),
        ({"messages": [{"role": "user", "content": "z" * 900}]}, 400, "at most 255 fit"),
    ],
)
def test_a_bad_request_is_refused_by_name(server: Running, fields: dict[str, Any], status: int, complaint: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == status
    assert complaint in response.json()["error"]["message"]
    assert server.chat(stream=True, **fields).status_code == status


def test_what_is_no_json_and_what_is_too_large(server: Running) -> None:
    response = server.client.post("/v1/messages", content=b"{")
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert server.client.post("/v1/messages", content=b" " * (17 << 20)).status_code == 413


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}])
def test_without_the_key_nothing_is_answered(server: Running, headers: dict[str, str]) -> None:
    response = httpx.post(f"{server.url}/v1/messages", json={}, headers=headers)
    assert response.status_code == 401
    assert KEY not in response.text
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": KEY}).json()["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(
    ("host", "open_to_others"), [("0.0.0.0", True), ("::", True), ("example.org", True), ("::1", False)]
)
def test_others_are_let_in_only_with_a_key(monkeypatch: pytest.MonkeyPatch, host: str, open_to_others: bool) -> None:
    monkeypatch.setenv("K2_SERVE_KEY", KEY)
    assert key_for(host) == KEY
    monkeypatch.delenv("K2_SERVE_KEY")
    with pytest.raises(UserError, match="K2_SERVE_KEY") if open_to_others else nullcontext():
        assert key_for(host) is None


def test_more_requests_than_may_wait_are_sent_away(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.batcher, "_most", 0)
    response = server.chat()
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert server.chat(stream=True).status_code == 429


def test_a_broken_model_is_said_and_shows_in_its_health(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(Transformer(CONFIG).initialize(0))
    service = Service("tiny", engine, tokenizer, rows=2, context=64, system=None)
    monkeypatch.setattr(service.batcher._session.decoder, "step", lambda *arguments: 1 / 0)
    transport = httpx.ASGITransport(application(service, None), raise_app_exceptions=False)

    async def ask() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = {"model": "tiny", "messages": HELLO}
            first = await client.post("/v1/chat/completions", json=asked)
            return first, await client.post("/v1/chat/completions", json=asked), await client.get("/health")

    first, second, health = asyncio.run(ask())
    assert {first.status_code, second.status_code, health.status_code} == {503}
    assert "ZeroDivisionError" in first.json()["error"]["message"]
    service.batcher.close()


def test_a_context_longer_than_the_models_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="--context is 500, this model has 256"):
        Service("tiny", Engine(Transformer(CONFIG)), tokenizer, rows=1, context=500, system=None)


def test_what_is_asked_and_answered_is_counted(server: Running) -> None:
    def seen(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"k2_serve_{name}", {"model": "tiny"} | labels) or 0.0

    def counts() -> list[float]:
        statuses = [seen("requests_total", status=status) for status in ("200", "401", "404")]
        tokens = [seen("tokens_total", kind=kind) for kind in ("read", "written")]
        return [*statuses, *tokens, seen("first_token_seconds_count"), seen("answer_seconds_count")]

    before = counts()
    usage = server.chat(max_tokens=5, temperature=0).json()["usage"]
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    assert "message_stop" in server.client.post("/v1/messages", json=asked).text
    server.client.get("/v1/models", headers={"Authorization": "Bearer another"})
    server.chat(model="other")
    changes = [after - earlier for after, earlier in zip(counts(), before, strict=True)]
    assert changes[:3] == [2, 1, 1]
    assert changes[3] == 2 * usage["prompt_tokens"]
    assert usage["completion_tokens"] < changes[4] <= usage["completion_tokens"] + 3
    assert changes[5:] == [2, 2]
    assert seen("open_questions") == seen("waiting_questions") == 0
