"""What Kubeflow's UI shows: artifacts of KFP's own types, from the artifacts of stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kfp.dsl import ClassificationMetrics, Markdown

from k2.evaluation.gate import Score, dump_scores
from k2.execution.views import show_decision, show_judgement
from k2.store.artifacts import Artifact

Make = Callable[..., Artifact]


def test_the_judges_verdicts_are_a_confusion_matrix(make_artifact: Make) -> None:
    verdicts = [[2, 1], [0, 2]]
    output = ClassificationMetrics(name="judge", uri="/tmp/j", metadata={})
    show_judgement(
        make_artifact("synthesize", {"report.json": json.dumps({"judge_confusion": verdicts}).encode()}), output
    )
    matrix = output.metadata["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == ["sound", "flawed"]
    assert [each["row"] for each in matrix["rows"]] == verdicts


def test_where_nothing_was_judged_there_is_none(make_artifact: Make) -> None:
    output = ClassificationMetrics(name="judge", uri="/tmp/j", metadata={})
    verdicts = [[0, 0], [0, 0]]
    show_judgement(
        make_artifact("synthesize", {"report.json": json.dumps({"judge_confusion": verdicts}).encode()}), output
    )
    assert output.metadata == {}


@pytest.mark.parametrize("champion", [None, {"scores": {"gcd": Score(value=0.25, low=0.2, high=0.3, n=9)}}])
def test_the_gates_decision_is_a_page(champion: Any, make_artifact: Make, tmp_path: Path) -> None:
    scores = {
        "gcd": Score(value=0.5, low=0.4, high=0.6, n=9),
        "loss": Score(value=2, low=1, high=3, n=9, better="lower"),
    }
    document = {"alias": "champion", "promote": True, "reasons": ["gcd: better"]}
    document |= {"candidate": {"scores": dump_scores(scores)}}
    document |= {"champion": champion and {"scores": dump_scores(champion["scores"])}}
    made = make_artifact("gate", {"decision.json": json.dumps(document).encode()})
    show_decision(made, Markdown(name="decision", uri=str(tmp_path / "page.md")))
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert lines[:3] == ["# The candidate becomes `champion`", "", "- gcd: better"]
    other = "0.25 (0.2 to 0.3)" if champion else "not measured"
    assert lines[-2:] == [
        f"| gcd | 0.5 (0.4 to 0.6) | {other} | higher |",
        "| loss | 2 (1 to 3) | not measured | lower |",
    ]
