import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from k2.data.tokenizer import Tokenizer
from k2.model import hf
from k2.store.artifacts import Artifact
from k2.store.client import Store
from tests.rl import program


@pytest.fixture
def inputs(make_artifact: Callable[..., Artifact], tmp_path: Path) -> dict[str, Artifact]:
    folder = tmp_path / "checkpoint"
    program.write_model(folder)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    long = b'{"id": "b", "messages": [{"role": "user", "content": "' + b"0" * 90 + b'"}], "tools": []}\n'
    return {
        "model": make_artifact("pretrain", files),
        "trajectories": make_artifact("synthesize", {"trajectories.jsonl": program.TRAJECTORY + long}),
    }


def test_the_stage_learns_counts_what_is_too_long_and_writes_a_checkpoint(
    store: Store, inputs: dict[str, Artifact]
) -> None:
    result = program.run_stage(store, "sft", "plain", inputs)
    metrics = result.metrics
    assert metrics["loss_last"] < metrics["loss_first"]
    assert metrics["accuracy"] == metrics["sampled"]["accuracy"]
    assert (metrics["dialogs"], metrics["dropped_too_long"]) == (33, 1)
    assert len(result.artifact.json("report.json")["curves"]["loss"]) == 7
    folder = result.artifact.directory()
    assert hf.load(folder).config.hidden_size == 16
    assert Tokenizer.load(folder / "tokenizer").vocab_size == 320


def test_killed_and_run_again_it_ends_in_the_same_bytes(store: Store, inputs: dict[str, Artifact]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, program.__file__, "sft", "resumed", inputs["model"].uri, inputs["trajectories"].uri, "5"]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -9, killed.stderr
    store.delete("work/resumed/lease.json")  # the lease of a dead process, which would otherwise have to expire
    resumed = program.run_stage(store, "sft", "resumed", inputs)
    assert resumed.artifact.digest == program.run_stage(store, "sft", "plain", inputs).artifact.digest
