"""From the RL model to the champion through every real stage: their files fit, and a rerun changes nothing."""

import json

import numpy as np
import pytest

from k2.agentic.tasks import HELDOUT_FILE
from k2.config.evaluate import EvaluateConfig
from k2.config.export import ExportConfig
from k2.config.gate import GateConfig
from k2.config.promote import PromoteConfig
from k2.config.quantize import QuantizeConfig
from k2.quant.checkpoint import load_int4
from k2.stages import evaluate, export, gate, promote, quantize
from k2.store.aliases import read_alias
from tests.quant.tiny import write_checkpoint

TASKS = {"addition_1": 1.0}
QUANTIZE = QuantizeConfig(
    tasks=TASKS,
    demonstrations=16,
    use_trajectories=False,
    steps=2,
    batch_size=2,
    context_length=64,
    lr=1e-4,
    warmup_steps=1,
    evaluation_items=2,
    evaluation_tokens=3,
)
EVALUATE = EvaluateConfig(
    tasks=tuple(TASKS), items=4, max_tokens=3, tool_items=1, heldout_tokens=400, context_length=16, samples=1
)
GATE = GateConfig(primary="addition_1/greedy", floors={"heldout/perplexity": 1e6})


@pytest.fixture
def chain(stage_harness, make_artifact, tmp_path):
    """`chain(seed)` quantises, exports and evaluates an RL model; returns the gate's inputs."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, 500).astype(np.uint16))
    np.save(tmp_path / "offsets.npy", np.array([0, 100, 500]))
    heldout = {f"heldout/{name}.npy": tmp_path / f"{name}.npy" for name in ("tokens", "offsets")}
    tokens = make_artifact("tokenize", heldout)
    trajectories = make_artifact("synthesize", {"trajectories.jsonl": b"", HELDOUT_FILE: b""})

    def make(seed):
        rl = make_artifact("rl", write_checkpoint(tmp_path / str(seed), seed))
        quantized = stage_harness(quantize.run, QUANTIZE, {"model": rl, "trajectories": trajectories}).artifact
        sources = {"model": rl, "quantized": quantized}
        first, again = (stage_harness(export.run, ExportConfig(), sources).artifact for _ in range(2))
        assert first.digest == again.digest
        models = {"base": rl, "sft": rl, "rl": rl, "export": first, "tokens": tokens, "trajectories": trajectories}
        return {"evaluation": stage_harness(evaluate.run, EVALUATE, models).artifact, "export": first}

    return make


def test_from_rl_to_champion_and_again(chain, stage_harness, store):
    inputs = chain(0)
    for expected in (True, False):
        decision = stage_harness(gate.run, GATE, inputs)
        assert decision.metrics["changed"] is expected
        moved = stage_harness(promote.run, PromoteConfig(), {"decision": decision.artifact, "export": inputs["export"]})
        assert moved.metrics["changed"] is expected
    champion = read_alias(store, "champion").artifact(store)
    assert champion.digest == inputs["export"].digest
    assert load_int4(champion.directory() / "int4").config.vocab_size == 320

    # Neither model can add: the second one is no better, so it stays out.
    rival = chain(1)
    decision = stage_harness(gate.run, GATE, rival)
    assert decision.metrics["promote"] is False
    document = json.loads(decision.artifact.path("decision.json").read_text())
    assert document["champion"]["uri"] == champion.uri
    moved = stage_harness(promote.run, PromoteConfig(), {"decision": decision.artifact, "export": rival["export"]})
    assert moved.metrics == {"changed": False, "alias": "champion", "champion": champion.uri}
