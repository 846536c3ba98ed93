"""`k2 pretrain` under torchrun: the same command and configuration, several processes, one artifact."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2.store.artifacts import Artifact, open_uri
from k2.store.client import Store
from tests.stages.test_pretrain import tokenized

Make = Callable[..., Artifact]
SETTINGS = (
    "precision=float32",
    "optimizer.newton_schulz_bf16=false",
    "stable_tokens=49152",
    "checkpoint_interval=4",
)
"""Without rounding to bfloat16, where the last bit becomes another choice of experts; and 60 steps."""


def command(tokens: Artifact, ranks: int) -> list[str]:
    """What a person types; torchrun before it for several ranks."""
    options = [part for setting in SETTINGS for part in ("--set", f"pretrain.{setting}")]
    stage = ["-m", "k2.cli", "pretrain", "--preset", "nano", "--input", f"tokens={tokens.uri}", "--json", *options]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=3"]
    return [sys.executable, *(torchrun if ranks > 1 else []), *stage]


def started(tokens: Artifact, ranks: int) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(tokens, ranks), env=environment, stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its `--json` answer."""
    answer, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    return dict(json.loads(answer))


def forget(store: Store, uri: str) -> str:
    """Remove an artifact, so that it is made again; returns its key."""
    key = uri.rsplit("/", 1)[-1]
    store.delete(f"pretrain/{key}/manifest.json")
    return key


def wait_for_checkpoint(store: Store, key: str, process: subprocess.Popen[str], before: bytes | None) -> bytes | None:
    """Return at a random moment after the next checkpoint."""
    while (index := store.get(f"work/{key}/index.json")) in (None, before):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.2))
    return index


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of what torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"k2.cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_two_ranks_have_the_losses_of_one_whatever_happens_to_them(store: Store, make_artifact: Make) -> None:
    tokens = tokenized(make_artifact, 40_000, 5_000)
    alone = finished(started(tokens, 1))
    expected = open_uri(store, alone["artifact"]).json("report.json")["curves"]["loss"]
    key = forget(store, alone["artifact"])

    together = finished(started(tokens, 2))
    assert together["artifact"] == alone["artifact"]
    artifact = open_uri(store, together["artifact"])
    assert artifact.json("report.json")["curves"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert finished(started(tokens, 2))["cached"]
    forget(store, together["artifact"])

    with started(tokens, 2) as process:
        wait_for_checkpoint(store, key, process, None)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "told to end after step" in said

    with started(tokens, 2) as process:
        wait_for_checkpoint(store, key, process, store.get(f"work/{key}/index.json"))
        os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
        again = finished(process)
    assert open_uri(store, again["artifact"]).digest == artifact.digest
