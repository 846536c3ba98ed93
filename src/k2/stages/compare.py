"""Stage `compare`: the arms of an ablation study as table, figures and page."""

import json

from k2.ablations.answers import read_answers
from k2.ablations.comparison import compare, compare_answers
from k2.ablations.page import files
from k2.ablations.training import read_training
from k2.config.ablations import StudyConfig
from k2.execution.contract import Progress, StageResult
from k2.store.artifacts import Artifact, ArtifactWriter


def run(config: StudyConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress) -> StageResult:
    """Write `report.json` and the study's Markdown, HTML and SVG files; `inputs` are checkpoints by label."""
    if config.stage == "tune":
        study = compare_answers(config, {label: read_answers(artifact) for label, artifact in inputs.items()})
    else:
        study = compare(config, {label: read_training(artifact) for label, artifact in inputs.items()})
    output.path("report.json").write_text(json.dumps(study, sort_keys=True) + "\n", encoding="utf-8")
    for name, text in files(study).items():
        output.path(name).write_text(text, encoding="utf-8")
    column = config.columns[0]
    metrics = {f"{arm['name']}/{column}": arm["values"][column]["mean"] for arm in study["arms"]}
    return StageResult(output.publish(**metrics))
