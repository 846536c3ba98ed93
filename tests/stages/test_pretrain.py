"""The stage on a real store: what it writes, and what it refuses."""

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2.config.pretrain import DataConfig, PretrainConfig
from k2.data.shards import write_shards
from k2.errors import UserError
from k2.execution.contract import StageResult
from k2.model import hf
from k2.stages.pretrain import run
from k2.store.artifacts import Artifact
from tests.training.small import CONFIG, corpus

Make = Callable[..., Artifact]
Harness = Callable[..., StageResult]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tokenized(make: Make, folder: Path, train: int = 4000, heldout: int = 400) -> Artifact:
    """Two domains in shards of about a quarter of their tokens."""
    (tokens, offsets), (other, other_offsets) = corpus(train), corpus(heldout)
    texts = [tokens[start:end].tolist() for start, end in pairwise(offsets)]
    domains = (("code" if number % 3 else "web", ids) for number, ids in enumerate(texts))
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    write_shards(domains, 64, shards, train // 4)
    files = {f"train/{path.name}": path.read_bytes() for path in shards.iterdir()}
    files |= {"heldout/tokens.npy": npy(other), "heldout/offsets.npy": npy(other_offsets)}
    return make("tokenize", files | {"tokenizer/tokenizer.json": b"{}"})


def test_it_publishes_a_checkpoint_and_the_same_one_again(
    stage_harness: Harness, make_artifact: Make, tmp_path: Path
) -> None:
    inputs = {"tokens": tokenized(make_artifact, tmp_path)}
    result = stage_harness(run, CONFIG, inputs)
    metrics = result.metrics
    assert metrics["loss_last"] < metrics["loss_first"] - 0.5
    assert metrics["heldout_loss"] < metrics["heldout_loss_first"] - 0.5
    assert metrics["tokens"] == CONFIG.steps * CONFIG.batch_tokens == 2560
    assert metrics["clipped_heads"] > 0
    assert metrics["max_attention_logit"] > CONFIG.optimizer.tau
    assert stage_harness(run, CONFIG, inputs).artifact.digest == result.artifact.digest

    folder = result.artifact.directory()
    model = hf.load(folder)
    assert model.config.rope_scaling == CONFIG.yarn
    assert result.artifact.json("config.json")["rope_scaling"]["factor"] == 2.0
    assert any(layer.mlp.gate.e_score_correction_bias.any() for layer in list(model.layers.values())[1:])
    hidden, _ = model(torch.arange(32)[None])
    assert hidden.isfinite().all()
    assert (folder / "tokenizer/tokenizer.json").read_bytes() == b"{}"
    check_report(result.artifact.json("report.json"))
    spans = [dict(zip(*pair, strict=True)) for pair in spans_of(result.artifact)]
    assert {span["corpus"] for span in spans} == {"code", "web"}
    assert max(span["window"] for span in spans) > 1
    lengths = {1: CONFIG.context_length, 2: CONFIG.long_context_length}
    assert sum((s["stop"] - s["start"]) * lengths[s["phase"]] for s in spans if s["phase"] in lengths) <= 2560


def spans_of(artifact: Artifact) -> list[tuple[list[str], list[Any]]]:
    ledger = artifact.json("report.json")["ledger"]
    return [(ledger["fields"], row) for row in ledger["read_once"]]


def check_report(report: dict[str, Any]) -> None:
    curves = report["curves"]
    assert {"loss", "lr", "grad_norm", "update_rms", "max_logits", "clipped_heads", "expert_load"} <= set(curves)
    assert {len(values) for values in curves.values()} == {CONFIG.steps}
    assert max(curves["lr"]) == CONFIG.lr
    assert curves["lr"][-1] == pytest.approx(CONFIG.lr * CONFIG.final_lr_ratio)
    assert report["tau"] == CONFIG.optimizer.tau
    assert sum(map(sum, report["clip_counts"])) == sum(curves["clipped_heads"])
    assert [phase["name"] for phase in report["phases"]][-1] == "long_context"
    json.dumps(report, allow_nan=False)


def test_short_heldout_text_is_a_user_error(stage_harness: Harness, make_artifact: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held-out"):
        stage_harness(run, CONFIG, {"tokens": tokenized(make_artifact, tmp_path, heldout=8)})


def test_the_mixture_weighs_domains_that_are_there(stage_harness: Harness, make_artifact: Make, tmp_path: Path) -> None:
    inputs = {"tokens": tokenized(make_artifact, tmp_path)}
    only = CONFIG.model_copy(update={"data": DataConfig(mixture={"web": 1.0})})
    spans = spans_of(stage_harness(run, only, inputs).artifact)
    assert {row[0] for _, row in spans} == {"web"}
    wrong = CONFIG.model_copy(update={"data": DataConfig(mixture={"web": 1.0, "art": 2.0})})
    with pytest.raises(UserError, match=r"data.mixture weighs 'art'; the domains here are code, web"):
        stage_harness(run, wrong, inputs)
    with pytest.raises(ValueError, match="weights must be positive"):
        DataConfig(mixture={"web": 0.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 32}, "at most the positions"),
        ({"long_context_length": 64}, "at most the positions"),
        ({"batch_tokens": 120}, "multiple of context_length"),
        ({"micro_batch_tokens": 24}, "at least long_context_length"),
        ({"model": CONFIG.model.model_copy(update={"rope_scaling": CONFIG.yarn})}, "rope_scaling must be null"),
        ({f"{p}_tokens": 0 for p in ("warmup", "stable", "decay", "annealing", "long_context")}, "must hold tokens"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**(CONFIG.model_dump() | changes))


def test_the_defaults_are_kimi_k2s_recipe() -> None:
    config = PretrainConfig()
    assert config.warmup_tokens == 500 * 67_108_864
    assert config.warmup_tokens + config.stable_tokens == 10**13
    assert config.total_tokens == 15_960 * 10**9
    assert config.lr * config.final_lr_ratio == pytest.approx(7e-6)
