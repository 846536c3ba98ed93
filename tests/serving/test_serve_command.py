import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from k2.data.tokenizer import Tokenizer
from k2.model import hf
from k2.model.transformer import Transformer
from tests.serving.test_server import CONFIG, HELLO


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf.save(Transformer(CONFIG).initialize(0), CONFIG, tmp_path)
    Tokenizer.train(["naïve café — hello world, how are you?"] * 5, 600).save(tmp_path)
    return tmp_path


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "k2.cli", "serve", str(folder), "--name", "tiny", *options]


def test_it_serves_until_it_is_told_to_stop(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(command(folder, "--port", str(port)), env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not _is_up(port) and time.monotonic() < deadline:
            time.sleep(0.1)
        asked = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] <= 3
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert f"tiny at http://127.0.0.1:{port}/v1" in said
    assert "Traceback" not in said


def test_a_port_of_the_world_without_a_key_is_refused_in_one_line(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("K2_SERVE_KEY", None)
    done = subprocess.run(
        command(folder, "--host", "0.0.0.0"), env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --host 0.0.0.0 lets others in: set K2_SERVE_KEY to the key that they must send\n"


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.ConnectError:
        return False
