"""What the KFP components of a study call: its configuration, one training of an arm, the comparison."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from k2.ablations.arms import arm_config, best_candidate, shared_section, study_config
from k2.config.ablations import StudyConfig
from k2.config.k2 import K2Config
from k2.config.load import parse_document
from k2.errors import StageError, UserError
from k2.execution.component import admit, deliver, leave, recorded
from k2.execution.registry import stage_spec
from k2.monitoring.events import progress_for
from k2.processes import end_with_run
from k2.store.artifacts import open_uri
from k2.store.client import Store


def resolve(definition: str, preset: str, overrides: str, run: str) -> str:
    """The configuration that all arms share, as JSON; ends the process with code 2 when it or an arm is not valid."""
    end_with_run()
    try:
        study = StudyConfig.model_validate_json(definition)
        config = study_config(study, preset, parse_document(overrides, "overrides"), run)
        for arm in study.arms:
            arm_config(shared_section(study, config), arm.fields, study.seeds[0])
        admit(preset)
    except ValidationError as error:
        leave(UserError(str(error)))
    except (UserError, StageError) as error:
        leave(error)
    # A terminal shows a row for each from the beginning.
    shared = ["corpus", "ingest", "rephrase", "tokenize"] + (["pretrain"] if study.stage == "tune" else [])
    stages = [*shared, *study.sweep_labels, *study.labels, "compare"]
    progress_for("run").event("planned", stages=stages)
    return config.model_dump_json()


def run_arm(
    definition: str,
    config_json: str,
    label: str,
    fields: str,
    tune: str,
    candidates: list[str],
    start: Any,
    artifact: Any,
    metrics: Any,
) -> str:
    """Run the study's stage for one arm and seed; returns the URI of its checkpoint.

    Args:
        config_json: the configuration that all arms share.
        label: name of this training in the run's record.
        fields: JSON of the fields of the stage in which it differs, its seed among them.
        start: manifest file of what it begins with: tokens, or a checkpoint.
        tune: the field that is taken from the best of `candidates`, URIs of earlier trainings.
    Raises:
        SystemExit: 2 for a user error, 1 for any other; the error is in the run's record.
    """
    config, study = K2Config.model_validate_json(config_json), StudyConfig.model_validate_json(definition)
    own = json.loads(fields)
    if candidates:
        store = Store.from_environment()
        own[tune] = best_candidate([open_uri(store, uri) for uri in candidates], tune)
    section = arm_config(shared_section(study, config), own, own.pop("seed"))
    (name,) = stage_spec(study.stage).inputs
    outcome = recorded(study.stage, section, {name: Path(start.path).read_text()}, config.run, label, config.preset)
    deliver(outcome, artifact, metrics)
    return outcome.artifact.uri


def run_compare(definition: str, config_json: str, runs: list[str], artifact: Any, page: Any, metrics: Any) -> None:
    """Run the stage `compare` over all trainings of a study, given by URI in the study's order."""
    config, study = K2Config.model_validate_json(config_json), StudyConfig.model_validate_json(definition)
    store = Store.from_environment()
    labels = [*study.sweep_labels, *study.labels]
    manifests = {
        label: open_uri(store, uri).manifest.model_dump_json() for label, uri in zip(labels, runs, strict=True)
    }
    outcome = recorded("compare", study, manifests, config.run)
    Path(page.path).write_bytes(outcome.artifact.path(f"{study.name}.html").read_bytes())
    deliver(outcome, artifact, metrics)
