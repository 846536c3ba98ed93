"""What KFP gets of a stage's metrics."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kfp.dsl import Metrics

from k2.config.gate import GateConfig
from k2.config.load import load_config
from k2.evaluation.gate import Score, dump_scores
from k2.execution.component import log_metrics, recorded, run_component
from k2.monitoring.run_record import read_run, summary, write_stage_record
from k2.store.aliases import move_alias, read_alias
from k2.store.artifacts import Artifact, finite, open_uri
from k2.store.client import Store

Make = Callable[..., Artifact]
VALUES = {
    "loss_last": math.nan,
    "scores": {"a": [1.0, -math.inf]},
    "tokens": 3,
    "name": "x",
    "accuracy": 0.5,
    "done": True,
}


def test_what_is_not_finite_is_text_with_a_flag_everywhere(store: Store, make_artifact: Make) -> None:
    """In the manifest, so that a cache hit says the same; in the run's record, in summary.json and for KFP."""
    made = make_artifact("pretrain", {"a": b"1"}, **VALUES)
    assert dict(made.statistics) == dict(open_uri(store, made.uri).statistics)
    assert made.statistics["loss_last"] == "nan"
    assert made.statistics["scores"] == {"a": [1.0, "-inf"]}
    assert made.statistics["nonfinite"] == ["loss_last", "scores"]
    write_stage_record(store, "r", {"stage": "pretrain", "status": "done", "metrics": made.statistics})
    text = json.dumps(summary("r", "nano", "done", 1.0, read_run(store, "r")), allow_nan=False)
    assert json.loads(text)["stages"]["pretrain"]["metrics"]["loss_last"] == "nan"


def test_kfp_metrics_are_finite_and_say_what_was_not() -> None:
    output = Metrics(name="metrics", uri="/tmp/m", metadata={})
    log_metrics(output, finite(VALUES))
    assert output.metadata == {
        "loss_last": "nan",
        "scores": "{'a': [1.0, '-inf']}",
        "nonfinite": "loss_last, scores",
        "tokens": 3,
        "accuracy": 0.5,
        "done": True,
    }
    json.dumps(output.metadata, allow_nan=False)


class Output:
    """As much of a KFP artifact as a component needs."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = str(path), dict[str, object]()

    def log_metric(self, name: str, value: float) -> None:
        self.metadata[name] = value


def test_a_run_has_a_report_as_soon_as_a_stage_ended_well_or_badly(store: Store, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("Experts are many, and few of them work on a token. " * 40)

    def corpus(path: Path) -> None:
        config = load_config("nano", {"run": "r", "corpus": {"paths": [str(path)]}})
        run_component("corpus", config.model_dump_json(), Output(tmp_path / "artifact"), Output(tmp_path / "metrics"))

    def pages() -> tuple[dict[str, Any], str]:
        return json.loads(store.get("runs/r/summary.json") or b""), (store.get("runs/r/report.html") or b"").decode()

    corpus(tmp_path / "corpus.txt")
    found, page = pages()
    assert (found["status"], found["stages"]["corpus"]["status"]) == ("running", "done")
    assert "running" in page
    with pytest.raises(SystemExit):
        corpus(tmp_path / "nowhere.txt")
    found, page = pages()
    assert (found["status"], found["stages"]["corpus"]["status"]) == ("failed", "failed")
    assert "nowhere.txt" in page


def test_a_gate_that_judged_something_new_found_nothing_done(store: Store, make_artifact: Make) -> None:
    """It always runs; also when the champion stays, it did its work, unless all before it was there already."""
    score = Score(value=0.5, low=0.4, high=0.6, n=10, protocol="p")
    evaluation = {"final": "int4", "models": {"int4": dump_scores({"sum": score})}}
    export = make_artifact("export", {"int4/config.json": b"{}"})
    move_alias(store, read_alias(store, "champion"), export)
    made = make_artifact("evaluate", {"evaluation.json": json.dumps(evaluation).encode()})
    inputs = {"evaluation": made, "export": export}
    manifests = {name: each.manifest.model_dump_json() for name, each in inputs.items()}
    for cached in (False, True):
        for stage in ("evaluate", "export"):
            write_stage_record(store, "r", {"stage": stage, "status": "done", "cached": cached})
        outcome = recorded("gate", GateConfig(primary="sum"), manifests, "r")
        assert (outcome.cached, outcome.metrics["promote"]) == (cached, False)
        assert summary("r", "nano", "done", 1.0, read_run(store, "r"))["stages"]["gate"]["cached"] is cached


def test_finite_metrics_have_no_flag() -> None:
    assert finite({"loss": 1.0, "pair": (1, 2.5)}) == {"loss": 1.0, "pair": (1, 2.5)}
