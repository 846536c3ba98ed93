import json
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
    return {
        "model": make_artifact("sft", files),
        "trajectories": make_artifact("synthesize", {"trajectories.jsonl": program.TRAJECTORY}),
    }


def test_the_stage_writes_a_checkpoint_curves_and_intervals(store: Store, inputs: dict[str, Artifact]) -> None:
    result = program.run_stage(store, "rl", "plain", inputs)
    assert {"reward_first", "reward_last", "accuracy_before", "accuracy_after"} <= result.metrics.keys()
    assert result.metrics["before"]["greedy"]["n"] == 10
    assert result.metrics["accuracy_after"] == result.metrics["after"]["sampled"]["accuracy"]
    report = result.artifact.json("report.json")
    assert len(report["curves"]["reward"]) == 12
    assert report["curves"]["logprob_gap"]
    assert [point["step"] for point in report["accuracy"]] == [0, 4, 8, 12]
    folder = result.artifact.directory()
    assert hf.load(folder).config.hidden_size == 16
    assert Tokenizer.load(folder / "tokenizer").vocab_size == 320
    json.dumps(dict(result.metrics))


@pytest.mark.parametrize("kill_after", [1, 5, 9])
def test_killed_at_any_step_and_run_again_it_ends_in_the_same_bytes(
    store: Store, inputs: dict[str, Artifact], kill_after: int
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    uris = [inputs["model"].uri, inputs["trajectories"].uri]

    def start(key: str, after: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, program.__file__, "rl", key, *uris, str(after)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    killed = start("resumed", kill_after)
    assert killed.returncode == -9, killed.stderr
    store.delete("work/resumed/lease.json")  # the lease of a dead process, which would otherwise have to expire
    resumed = program.run_stage(store, "rl", "resumed", inputs)
    assert resumed.artifact.digest == program.run_stage(store, "rl", "plain", inputs).artifact.digest
