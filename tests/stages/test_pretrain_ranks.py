"""`k2 pretrain` under torchrun: the same command and configuration, several processes, one artifact."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2.config.load import load_config
from k2.execution.contract import StageResult
from k2.stages.pretrain import run
from k2.store.artifacts import Artifact, open_uri
from k2.store.client import Store
from tests.distributed.selection import LATER
from tests.stages.test_pretrain import tokenized

Make = Callable[..., Artifact]
Harness = Callable[..., StageResult]
SETTINGS = {
    "precision": "float32",
    "optimizer": "{tau: 1.0, bias_update_speed: 0.01, newton_schulz_bf16: false}",
    "stable_tokens": "49152",
    "checkpoint_interval": "4",
}
"""Without rounding to bfloat16, where the last bit becomes another choice of experts; and 60 steps."""


def command(tokens: Artifact, ranks: int) -> list[str]:
    """What a person types; torchrun before it for several ranks."""
    options = [part for name, value in SETTINGS.items() for part in ("--set", f"pretrain.{name}={value}")]
    stage = ["-m", "k2.cli", "pretrain", "--preset", "nano", "--input", f"tokens={tokens.uri}", "--json", *options]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=3"]
    return [sys.executable, *(torchrun if ranks > 1 else []), *stage]


def started(tokens: Artifact, ranks: int, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(tokens, ranks), env=environment, stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its `--json` answer."""
    answer, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return dict(json.loads(answer))


class Gate:
    """A way to the store that can be closed: connections break, and new ones are refused at once."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target, self.open = (host, int(port)), True
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> "Gate":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if not self.open:
                    client.close()
                    continue
                other = socket.create_connection(self._target)
                for pair in ((client, other), (other, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError), source, target:
            while self.open and (data := source.recv(65536)):
                target.sendall(data)


def wait_for_checkpoint(store: Store, key: str, process: subprocess.Popen[str], step: int = 1) -> None:
    """Return at a random moment after the first checkpoint of a step or a later one."""
    while not any(int(name[-9:]) >= step for name in saved(store, key)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.2))


def saved(store: Store, key: str) -> list[str]:
    """Names of the checkpoints."""
    return sorted(json.loads(store.get(f"work/{key}/index.json") or b"{}"))


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of what torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"k2.cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture
def tokens(make_artifact: Make, tmp_path: Path) -> Artifact:
    return tokenized(make_artifact, tmp_path, 40_000, 5_000)


@pytest.fixture
def together(store: Store, tokens: Artifact) -> Artifact:
    """What two ranks make when nothing happens to them; made again it is not there."""
    made = open_uri(store, finished(started(tokens, 2))["artifact"])
    store.delete(f"pretrain/{made.key}/manifest.json")
    return made


def test_two_ranks_have_the_losses_of_one_even_if_one_is_killed(
    store: Store, tokens: Artifact, together: Artifact, stage_harness: Harness
) -> None:
    settings = {"pretrain": {name: yaml.safe_load(value) for name, value in SETTINGS.items()}}
    alone = stage_harness(run, load_config("nano", settings).pretrain, {"tokens": tokens}).artifact
    ours, theirs = (each.json("report.json")["curves"]["loss"] for each in (together, alone))
    assert len(ours) == 60
    assert ours == pytest.approx(theirs, rel=1e-4)
    with started(tokens, 2) as process:
        wait_for_checkpoint(store, together.key, process, step=random.randrange(1, 41))
        os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
        print(f"killed after {saved(store, together.key)[-1]}")
        again = finished(process)
    assert open_uri(store, again["artifact"]).digest == together.digest


@LATER[0]
@LATER[1]
def test_a_store_that_is_away_for_a_while_costs_nothing(store: Store, tokens: Artifact, together: Artifact) -> None:
    with Gate(store.settings.endpoint) as gate, started(tokens, 2, K2_S3_ENDPOINT=gate.endpoint) as process:
        wait_for_checkpoint(store, together.key, process)
        gate.open = False
        time.sleep(5.0)
        gate.open = True
        answer, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert ": waiting up to 900 s for the store" in said
    assert "Restart" not in said
    assert open_uri(store, json.loads(answer)["artifact"]).digest == together.digest


@LATER[0]
@LATER[1]
def test_told_to_end_they_save_and_go_on_later(store: Store, tokens: Artifact, together: Artifact) -> None:
    with started(tokens, 2) as process:
        wait_for_checkpoint(store, together.key, process)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    step = int(re.findall(r"told to end after step (\d+)", said)[0])
    assert saved(store, together.key)[-1] == f"checkpoint-{step:09d}"
    assert open_uri(store, finished(started(tokens, 2))["artifact"]).digest == together.digest
    assert finished(started(tokens, 2))["cached"]
