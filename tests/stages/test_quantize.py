"""The stage on a real store: metrics, what is trained, and bytes after a kill."""

import json

import pytest
import torch

from k2.config.quantize import QuantizeConfig
from k2.errors import UserError
from k2.model import hf
from k2.stages.quantize import run
from k2.store.artifacts import ArtifactWriter
from k2.store.lease import Lease
from k2.store.work import WorkArea
from tests.quant.tiny import TINY, model, write_checkpoint

CONFIG = QuantizeConfig(
    tasks={"addition_1": 1.0},
    demonstrations=32,
    steps=5,
    batch_size=4,
    micro_batch_size=2,
    context_length=96,
    precision="float32",
    lr=2e-3,
    warmup_steps=1,
    checkpoint_steps=2,
    evaluation_items=4,
    evaluation_tokens=4,
)
TRAJECTORY = {
    "id": "t0",
    "messages": [{"role": "user", "content": "Save a note"}, {"role": "assistant", "content": "Saved."}],
    "tools": [],
}


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.fixture
def inputs(make_artifact, tmp_path):
    trajectories = make_artifact("synthesize", {"trajectories.jsonl": json.dumps(TRAJECTORY).encode() + b"\n"})
    return {"model": make_artifact("rl", write_checkpoint(tmp_path / "rl")), "trajectories": trajectories}


def run_as(key, store, inputs, progress, config=CONFIG):
    with Lease(store, f"work/{key}/lease.json") as lease:
        writer = ArtifactWriter(store, "quantize", key, WorkArea(store, key, lease))
        try:
            return run(config, inputs, writer, progress=progress)
        finally:
            writer.discard()


def test_publishes_trained_masters_and_metrics(stage_harness, inputs):
    result = stage_harness(run, CONFIG, inputs)
    metrics, artifact = result.metrics, result.artifact
    assert artifact.statistics == metrics
    assert set(metrics) >= {"accuracy_bf16", "accuracy_int4", "accuracy_int4_ptq", "bits_per_weight"}
    assert metrics["loss_before_qat"] > 0
    assert artifact.json("quantization.json") == {"bits": 4, "group_size": 32}
    trained, before = hf.load(artifact.directory()), model()
    assert trained.config == hf.read_config(artifact.directory())
    name = "layers.1.mlp.experts.down_proj"
    assert not torch.equal(trained.state_dict()[name], before.state_dict()[name])
    bias = "layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(trained.state_dict()[bias], before.state_dict()[bias])
    report = artifact.json("report.json")
    assert len(report["curves"]["loss"]) == CONFIG.steps
    assert report["measurements"]["int4"]["accuracy"]["n"] == CONFIG.evaluation_items


def test_a_killed_run_ends_in_the_same_bytes(store, inputs, progress):
    whole = run_as("a" * 64, store, inputs, progress).artifact.digest
    update = progress.update

    def kill_at_step_four(done, total, unit, **values):
        update(done, total, unit, **values)
        if done == 4:
            raise Killed

    progress.update = kill_at_step_four
    with pytest.raises(Killed):
        run_as("b" * 64, store, inputs, progress)
    progress.update, progress.updates = update, []
    resumed = run_as("b" * 64, store, inputs, progress)
    assert [entry["done"] for entry in progress.updates if entry["unit"] == "steps"] == [3, 4, 5]
    assert resumed.artifact.digest == whole


def test_no_steps_is_plain_rounding(stage_harness, inputs):
    config = CONFIG.model_copy(update={"steps": 0, "warmup_steps": 0, "use_trajectories": False})
    result = stage_harness(run, config, inputs)
    assert result.metrics["loss_after_qat"] == result.metrics["loss_before_qat"]
    state = hf.load(result.artifact.directory()).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model().state_dict().items())


def test_a_group_that_does_not_fit_is_refused_before_any_work(stage_harness, inputs):
    assert TINY.moe_intermediate_size % 24
    with pytest.raises(UserError, match=r"quantize\.group_size \(24\)"):
        stage_harness(run, CONFIG.model_copy(update={"group_size": 24}), inputs)
