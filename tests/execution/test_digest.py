"""Artifact keys change with what decides the bytes, and with nothing else."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import k2
from k2.config.base import Section, setting
from k2.execution.digest import artifact_key, code_digest, import_closure, package_versions
from k2.execution.registry import STAGES, StageSpec
from k2.store.artifacts import Artifact

ROOT = Path(k2.__file__).parents[2]


class Toy(Section):
    lr: float = setting(1.0, "matters")
    threads: int = setting(1, "does not", semantic=False)


SPEC = STAGES["promote"]


def key(config: Section, inputs: dict[str, Artifact] | None = None, external: str | None = None) -> str:
    return artifact_key(SPEC, config, inputs or {}, external)


def test_semantic_fields_decide_the_key() -> None:
    assert key(Toy()) == key(Toy(threads=8)) == key(Toy.model_validate({"lr": 1}))
    assert key(Toy()) != key(Toy(lr=2.0))


def test_inputs_enter_by_content(make_artifact: Callable[..., Artifact]) -> None:
    same = [make_artifact("gate", {"a": b"1"}) for _ in range(2)]
    other = make_artifact("gate", {"a": b"2"})
    keys = [key(Toy(), {"decision": artifact}) for artifact in (*same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_external_state_and_stage_enter() -> None:
    assert key(Toy(), external="a") != key(Toy(), external="b")
    assert key(Toy()) != artifact_key(STAGES["gate"], Toy(), {}, None)


def test_the_closure_follows_imports_and_nothing_else() -> None:
    closure = import_closure("k2.store.work")
    assert {"k2", "k2.errors", "k2.store", "k2.store.lease", "k2.store.client"} <= closure
    assert not any(name.startswith(("k2.model", "k2.commands", "k2.config")) for name in closure)


@pytest.mark.parametrize("spec", STAGES.values(), ids=lambda spec: spec.name)
def test_every_stage_has_code_and_installed_packages(spec: StageSpec) -> None:
    assert len(code_digest(spec.module)) == 64
    assert all("+" not in version for version in package_versions(spec.packages).values())


def test_data_stages_do_not_depend_on_training_code() -> None:
    assert not any(
        name.startswith(("k2.model", "k2.training", "k2.optim")) for name in import_closure("k2.stages.ingest")
    )


def test_a_copy_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src" / "k2", tmp_path / "k2", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from k2.execution.digest import code_digest; print(code_digest('k2.stages.tokenize'))"
    run = [sys.executable, "-c", code]
    copied = subprocess.run(
        run, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert copied.stdout.strip() == code_digest("k2.stages.tokenize")
