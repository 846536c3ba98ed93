"""The stage on a real store: four models, one table, and going on after a kill."""

import numpy as np
import pytest

from k2.agentic.tasks import HELDOUT_FILE, Agent, Persona, Rubric, Task, write
from k2.agentic.tools import ToolSpec
from k2.config.evaluate import EvaluateConfig
from k2.config.export import ExportConfig
from k2.evaluation.gate import parse_scores
from k2.interop.convert import write_folder
from k2.stages import evaluate
from k2.stages.evaluate import MODELS, run
from k2.store.artifacts import ArtifactWriter
from k2.store.lease import Lease
from k2.store.work import WorkArea
from tests.quant.tiny import write_checkpoint

CONFIG = EvaluateConfig(
    tasks=("addition_1",),
    items=4,
    max_tokens=3,
    tool_items=2,
    heldout_tokens=400,
    context_length=16,
    samples=1,
    precision="float32",
)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def unseen_task(world: str) -> Task:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    tool = ToolSpec(name="do", description="Do it", parameters=parameters, world=world, category="x")
    return Task(
        id=world,
        world=world,
        difficulty=1,
        agent=Agent(system="", tools=(tool,)),
        persona=Persona(name="Ada", style="plain"),
        goals=(),
        initial={},
        rubric=Rubric(),
    )


@pytest.fixture
def inputs(make_artifact, tmp_path):
    models = {
        name: make_artifact(kind, write_checkpoint(tmp_path / name, seed))
        for seed, (name, kind) in enumerate([("base", "pretrain"), ("sft", "sft"), ("rl", "rl")])
    }
    (tmp_path / "int4").mkdir()
    write_folder(tmp_path / "rl", tmp_path / "int4", "int4", 32, ExportConfig(shard_bytes=100_000))
    exported = {f"int4/{path.name}": path for path in (tmp_path / "int4").iterdir()} | {"bf16/config.json": b"{}"}
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, 500).astype(np.uint16))
    np.save(tmp_path / "offsets.npy", np.array([0, 100, 500]))
    heldout = {f"heldout/{name}.npy": tmp_path / f"{name}.npy" for name in ("tokens", "offsets")}
    write(tmp_path / HELDOUT_FILE, [unseen_task("mcp:time"), unseen_task("evolved:heating")])
    return models | {
        "export": make_artifact("export", exported),
        "tokens": make_artifact("tokenize", heldout),
        "trajectories": make_artifact("synthesize", {HELDOUT_FILE: tmp_path / HELDOUT_FILE}),
    }


def test_four_models_side_by_side(stage_harness, inputs):
    result = stage_harness(run, CONFIG, inputs)
    assert result.artifact.statistics == result.metrics
    names = {"heldout/perplexity"} | {
        f"{task}/{mode}"
        for task in ("addition_1", "heldout_servers", "heldout_domains")
        for mode in ("sampled", "greedy")
    }
    assert set(result.metrics["scores"]) == names
    assert set(result.metrics["models"]) == set(MODELS)
    document = result.artifact.json("evaluation.json")
    final = parse_scores(document["models"][document["final"]])
    assert {name: score.value for name, score in final.items()} == result.metrics["scores"]
    perplexities = {row["heldout/perplexity"] for row in result.metrics["models"].values()}
    assert len(perplexities) == len(MODELS)  # the INT4 model is not the RL model over again
    report = result.artifact.json("report.json")
    assert report["order"] == list(MODELS)
    assert {row["task"] for row in report["samples"]["int4"]} == {"addition_1", "heldout_servers", "heldout_domains"}


def test_a_killed_run_measures_only_what_is_left(store, inputs, progress, monkeypatch):
    def run_as(key):
        with Lease(store, f"work/{key}/lease.json") as lease:
            writer = ArtifactWriter(store, "evaluate", key, WorkArea(store, key, lease))
            try:
                return run(CONFIG, inputs, writer, progress=progress)
            finally:
                writer.discard()

    loaded = []

    def load(config, inputs, name):
        loaded.append(name)
        if name == "rl" and loaded.count("rl") == 1:
            raise Killed
        return original(config, inputs, name)

    original = evaluate._load
    monkeypatch.setattr(evaluate, "_load", load)
    with pytest.raises(Killed):
        run_as("b" * 64)
    resumed = run_as("b" * 64)
    assert loaded == ["base", "sft", "rl", "rl", "int4"]
    assert resumed.artifact.digest == run_as("a" * 64).artifact.digest
