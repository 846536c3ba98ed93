"""Stage `compare`: the trainings of an ablation study as table, figures and page."""

import json

from k2.ablations.comparison import compare
from k2.ablations.page import files
from k2.ablations.training import read_training
from k2.config.ablations import StudyConfig
from k2.execution.contract import Progress, StageResult
from k2.store.artifacts import Artifact, ArtifactWriter


def run(config: StudyConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress) -> StageResult:
    """Write `report.json` and the study's Markdown, HTML and SVG files; `inputs` are checkpoints by label."""
    trainings = {}
    for done, (label, artifact) in enumerate(sorted(inputs.items()), 1):
        trainings[label] = read_training(artifact)
        progress.update(done, len(inputs), "trainings")
    study = compare(config, trainings)
    output.path("report.json").write_text(json.dumps(study, sort_keys=True) + "\n", encoding="utf-8")
    for name, text in files(study).items():
        output.path(name).write_text(text, encoding="utf-8")
    metrics = {f"{arm['name']}/heldout_loss": arm["values"]["heldout_loss"]["mean"] for arm in study["arms"]}
    return StageResult(output.publish(**metrics))
