"""`k2 pretrain` under torchrun: the same command and configuration, several processes, one artifact."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from k2.store.artifacts import Artifact, open_uri
from k2.store.client import Store
from tests.stages.test_pretrain import tokenized

Make = Callable[..., Artifact]
EXACT = ("pretrain.precision=float32", "pretrain.optimizer.newton_schulz_bf16=false")


def command(tokens: Artifact, ranks: int, settings: Sequence[str], *, restarts: int = 0) -> list[str]:
    """What a person types; torchrun before it for several ranks."""
    options = [part for setting in settings for part in ("--set", setting)]
    stage = ["-m", "k2.cli", "pretrain", "--preset", "nano", "--input", f"tokens={tokens.uri}", "--json", *options]
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
    ]
    return [sys.executable, *(torchrun if ranks > 1 else []), *stage]


def pretrained(tokens: Artifact, ranks: int, *settings: str) -> dict[str, Any]:
    """Its `--json` answer."""
    run = subprocess.run(
        command(tokens, ranks, settings), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def losses(store: Store, answer: dict[str, Any]) -> list[float]:
    return list(open_uri(store, answer["artifact"]).json("report.json")["curves"]["loss"])


def test_two_ranks_have_the_losses_of_one(store: Store, make_artifact: Make) -> None:
    tokens = tokenized(make_artifact, 40_000, 5_000)
    alone = pretrained(tokens, 1, *EXACT)
    key = alone["artifact"].rsplit("/", 1)[-1]
    store.delete(f"pretrain/{key}/manifest.json")
    together = pretrained(tokens, 2, *EXACT)
    assert together["artifact"] == alone["artifact"]
    assert losses(store, together) == pytest.approx(losses(store, alone), rel=1e-4)
    assert pretrained(tokens, 2, *EXACT)["cached"]
