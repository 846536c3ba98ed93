"""The endpoint generator against a real HTTP server that fails in the ways servers fail."""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from k2.config.generator import GeneratorConfig
from k2.errors import StageError, UserError
from k2.generation import openai
from k2.generation.factory import build_generator
from k2.generation.openai import Endpoint
from k2.generation.protocol import GenerationRequest


class Server(ThreadingHTTPServer):
    """Answers with the last message in upper case, after the faults it was told to inject."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            fault = self.server.faults.pop(0) if self.server.faults else ""
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        time.sleep(0.05)
        with self.server.lock:
            self.server.running -= 1
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        if fault == "hang":
            time.sleep(0.6)
        self.respond(int(fault) if fault.isdigit() else 200, body)

    def respond(self, status: int, body: dict) -> None:
        text = body["messages"][-1]["content"].upper()
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        answer = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(openai, "FIRST_WAIT_S", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest([{"role": "user", "content": f"text {n}"}], seed=n) for n in range(count)]


def config(**values: object) -> GeneratorConfig:
    return GeneratorConfig(**{"backend": "endpoint", "model": "m", "timeout_s": 5, "retries": 4, **values})


def test_answers_come_in_order_and_concurrently(server: Server) -> None:
    answers = Endpoint(config(concurrency=4), server.url, "secret").generate(requests(12))
    assert [answer.text for answer in answers] == [f"TEXT {n}" for n in range(12)]
    assert answers[0].usage.prompt_tokens == 3
    assert 2 <= server.most_running <= 4
    assert set(server.keys) == {"Bearer secret"}
    assert sorted(body["seed"] for body in server.bodies) == list(range(12))


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "hang"])
def test_transient_faults_are_retried(server: Server, fault: str) -> None:
    server.faults = [fault, fault]
    [answer] = Endpoint(config(timeout_s=0.3), server.url, None).generate(requests(1))
    assert answer.text == "TEXT 0"
    assert len(server.bodies) == 3


def test_a_server_that_keeps_failing_is_a_stage_error(server: Server) -> None:
    server.faults = ["500"] * 9
    with pytest.raises(StageError, match="answered 500, 3 attempts; run again"):
        Endpoint(config(retries=2), server.url, None).generate(requests(1))


@pytest.mark.parametrize(("status", "remedy"), [("401", "K2_LLM_API_KEY"), ("404", "generator.model")])
def test_a_refused_request_is_not_retried(server: Server, status: str, remedy: str) -> None:
    server.faults = [status]
    with pytest.raises(UserError, match=remedy) as caught:
        Endpoint(config(), server.url, "secret-key").generate(requests(1))
    assert "secret-key" not in str(caught.value)
    assert len(server.bodies) == 1


def test_an_unreachable_endpoint_is_named_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "FIRST_WAIT_S", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"http://127.0.0.1:{port}/v1 cannot be reached") as caught:
        Endpoint(config(retries=1), f"http://me:hunter2@127.0.0.1:{port}/v1", "secret").generate(requests(2))
    assert "hunter2" not in str(caught.value)


def test_the_environment_names_the_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K2_LLM_ENDPOINT", raising=False)
    with pytest.raises(UserError, match="K2_LLM_ENDPOINT"):
        build_generator(config())
    monkeypatch.setenv("K2_LLM_ENDPOINT", server.url)
    monkeypatch.setenv("K2_LLM_API_KEY", "from-env")
    pieces: list[tuple[int, str]] = []
    build_generator(config()).generate(requests(1), stream=lambda n, text: pieces.append((n, text)))
    assert pieces == [(0, "TEXT 0")]
    assert server.keys == ["Bearer from-env"]
