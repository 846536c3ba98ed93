"""Stage `evaluate`: base, SFT, RL and INT4 measured by one suite, side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from k2.agentic.tasks import HELDOUT_FILE, read
from k2.config.evaluate import EvaluateConfig
from k2.data.tokenizer import Tokenizer
from k2.evaluation.gate import dump_scores
from k2.evaluation.suite import Suite, heldout_tool_tasks
from k2.execution.contract import Progress, StageResult
from k2.model import hf
from k2.model.transformer import Transformer
from k2.quant.checkpoint import load_int4
from k2.store.artifacts import Artifact, ArtifactWriter

MODELS = ("base", "sft", "rl", "int4")
"""In the order in which they were made; the last one is what the gate judges."""


def run(
    config: EvaluateConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Publish `evaluation.json` (all scores with intervals), and tables and answers for the report.

    Finished models are kept in the work area, so that a killed run measures only what is left.

    Raises:
        UserError: unknown task, or too little held-out text.
    """
    suite = _suite(config, inputs)
    measured = {}
    for number, name in enumerate(MODELS):
        saved = output.work.load(f"{name}.json")
        measured[name] = json.loads(saved) if saved else _measure(suite, _load(config, inputs, name))
        if saved is None:
            output.work.save({f"{name}.json": json.dumps(measured[name]).encode()})
        progress.update(number + 1, len(MODELS), "models", model=name)
    scores = {name: result["scores"] for name, result in measured.items()}
    table = {name: {metric: score["value"] for metric, score in rows.items()} for name, rows in scores.items()}
    evaluation = {"final": MODELS[-1], "models": scores}
    report = evaluation | {"order": list(MODELS), "samples": {n: result["samples"] for n, result in measured.items()}}
    output.path("evaluation.json").write_text(json.dumps(evaluation, indent=1, sort_keys=True) + "\n")
    output.path("report.json").write_text(json.dumps(report, sort_keys=True))
    metrics = {"scores": table[MODELS[-1]], "models": table}
    return StageResult(output.publish(**metrics))


def _suite(config: EvaluateConfig, inputs: dict[str, Artifact]) -> Suite:
    base, tokens = inputs["base"].directory(), inputs["tokens"]
    tokenizer = Tokenizer.load(base / "tokenizer")
    unseen = read(inputs["trajectories"].path(HELDOUT_FILE))
    room = hf.read_config(base).max_position_embeddings - config.max_tokens
    return Suite(
        config,
        tokenizer,
        np.load(tokens.path("heldout/tokens.npy"), mmap_mode="r"),
        np.load(tokens.path("heldout/offsets.npy")),
        heldout_tool_tasks((tool for task in unseen for tool in task.agent.tools), tokenizer, room),
    )


def _load(config: EvaluateConfig, inputs: dict[str, Artifact], name: str) -> Transformer:
    dtype = getattr(torch, config.precision)
    if name != "int4":
        return hf.load(inputs[name].directory(), compute_dtype=dtype)
    return load_int4(_folder(inputs["export"], "int4"), compute_dtype=dtype)


def _folder(export: Artifact, name: str) -> Path:
    """One of the export's two folders; the other one is not fetched."""
    paths = [export.path(file) for file in export.files if file.startswith(f"{name}/")]
    return paths[0].parent


def _measure(suite: Suite, model: Transformer) -> dict[str, Any]:
    return {"scores": dump_scores(suite.measure(model)), "samples": suite.samples(model)}
