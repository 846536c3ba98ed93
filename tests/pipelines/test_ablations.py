"""The ablation studies as pipelines: what a cluster would be asked to run, and one run of one on this machine."""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, local

from k2.ablations.arms import arm_config, shared_section, study_config
from k2.ablations.page import files, rows
from k2.commands.run import PIPELINES
from k2.config.ablations import ArmConfig, StudyConfig
from k2.monitoring.run_record import read_run
from k2.monitoring.standalone import markdown_table
from k2.store.artifacts import open_uri
from k2.store.client import Store
from pipelines.ablations.qk_clip import STUDY
from pipelines.ablations.study import study_pipeline

ROOT = Path(__file__).parents[2]
NAMES = [name.removeprefix("ablations/") for name in PIPELINES if name.startswith("ablations/")]
SHOWN = sorted((ROOT / "docs" / "ablations").glob("*.json"))


def definition(name: str) -> StudyConfig:
    study: StudyConfig = importlib.import_module(f"pipelines.ablations.{name}").STUDY
    return study


def test_every_study_can_be_run() -> None:
    modules = {path.stem for path in (ROOT / "pipelines" / "ablations").glob("*.py") if "STUDY =" in path.read_text()}
    assert modules == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_valid_and_unlike_the_others(name: str) -> None:
    study = definition(name)
    assert len(study.seeds) >= 3
    for preset in ("tiny", "small", "k2-1t"):
        shared = shared_section(study, study_config(study, preset, {}))
        arms = [arm_config(shared, arm.fields, 1).model_dump_json() for arm in study.arms]
        assert len(set(arms)) == len(arms)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_per_training_and_one_comparison_of_all(name: str, tmp_path: Path) -> None:
    study = definition(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiler.Compiler().compile(study_pipeline(study), str(tmp_path / "study.yaml"))
    spec = next(yaml.safe_load_all((tmp_path / "study.yaml").read_text()))
    dags = [component["dag"]["tasks"] for component in spec["components"].values() if "dag" in component]
    tasks = next(tasks for tasks in dags if "compare" in tasks)
    arms = {task["taskInfo"]["name"]: task for task in tasks.values() if "fields" in task["inputs"]["parameters"]}
    assert set(arms) == {*study.labels, *study.sweep_labels}
    compared = tasks["compare"]["inputs"]["parameters"]["runs"]["runtimeValue"]["constant"]
    assert len(compared) == len(arms)
    assert [arm["inputs"]["artifacts"]["start"]["taskOutputArtifact"]["producerTask"] for arm in arms.values()]
    for arm in study.arms:
        tuned = arms[f"{arm.name}.{study.seeds[0]}"]["inputs"]["parameters"]["candidates"]["runtimeValue"]["constant"]
        assert len(tuned) == len(study.candidates(arm.name))


SMALL = STUDY.model_copy(
    update={
        "arms": (
            ArmConfig(name="muon", fields={"optimizer": {"tau": None}}),
            ArmConfig(name="tau-1", fields={"optimizer": {"tau": 1.0}}),
            ArmConfig(name="again", fields={"optimizer": {"tau": 1.0}}),
        ),
        "seeds": (1, 2),
    }
)


def test_a_study_runs_and_trains_nothing_twice(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    records = run(store, tmp_path, "first")
    assert set(records) >= {"tokenize", *SMALL.labels, "compare", "report"}
    artifact = open_uri(store, records["compare"]["artifact"])
    study = artifact.json("report.json")
    arms = {arm["name"]: arm for arm in study["arms"]}
    assert arms["tau-1"]["values"]["max_logit"]["mean"] < arms["muon"]["values"]["max_logit"]["mean"]
    assert arms["tau-1"]["values"]["clipped_heads"]["mean"] > arms["muon"]["values"]["clipped_heads"]["mean"] == 0
    assert {name: artifact.path(name).read_text() for name in files(study)} == files(study)
    page = (store.get("runs/first/report.html") or b"").decode()
    assert all(text in page for text in (SMALL.question, "tau-1.2", "<svg"))
    trained = [{records[f"{arm}.{seed}"]["cached"] for arm in ("tau-1", "again")} for seed in SMALL.seeds]
    assert trained == [{True, False}] * 2, "equal trainings are one, whichever arm comes first"


def run(store: Store, folder: Path, name: str) -> dict[str, Any]:
    """The records of a run of the small study on the smallest preset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / name))
        study_pipeline(SMALL)(preset="nano", overrides="rephrase: {max_documents: 0}", run=name)
    return {record["stage"]: record for record in read_run(store, name)}


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_the_documents_show_what_the_pipeline_made(path: Path) -> None:
    study = json.loads(path.read_text())
    for name, text in files(study).items():
        if not name.endswith(".html"):
            assert path.with_name(name).read_text() == text, name


def test_the_page_shows_the_committed_tables() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("ablations.md", "rl-vs-sft.md"))
    assert SHOWN
    for path in SHOWN:
        assert markdown_table(rows(json.loads(path.read_text()))) in text, path.stem
