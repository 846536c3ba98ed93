"""The compiled DAG: what a cluster would be asked to run."""

from pathlib import Path
from typing import Any

import pytest

from k2.config.deployment import Deployment
from k2.execution.registry import STAGES
from k2.platform.documents import read_section
from k2.platform.render import render


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Pipeline spec and platform spec."""
    file = Path(__file__).parents[2] / "pipelines" / "deployments" / "cpu.yaml"
    rendering = render("k2", read_section(file, Deployment))
    return [rendering.spec, rendering.platform]


def tasks(node: Any) -> dict[str, dict[str, Any]]:
    """Every task of every DAG in the spec, by name."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(node, dict):
        for name, task in node.get("tasks", {}).items() if isinstance(node.get("tasks"), dict) else ():
            found[name] = task
        for value in node.values():
            found |= tasks(value)
    return found


def executors(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(spec["deploymentSpec"]["executors"])


def test_every_stage_is_a_task(documents: list[dict[str, Any]]) -> None:
    assert set(tasks(documents[0])) == {*STAGES, "configure", "exit-handler-1"}


def test_the_wiring_is_the_registry_s(documents: list[dict[str, Any]]) -> None:
    for name, spec in STAGES.items():
        artifacts = tasks(documents[0])[name].get("inputs", {}).get("artifacts", {})
        wired = {key: value["taskOutputArtifact"]["producerTask"] for key, value in artifacts.items()}
        assert wired == dict(spec.inputs)


def test_kfp_s_own_cache_is_off_everywhere(documents: list[dict[str, Any]]) -> None:
    for name, task in tasks(documents[0]).items():
        assert task.get("cachingOptions", {}).get("enableCache", False) is False, name


def test_parameters_are_few_typed_and_described(documents: list[dict[str, Any]]) -> None:
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == {"preset", "overrides", "run"}
    assert all(p["description"] and p["parameterType"] == "STRING" for p in parameters.values())


def test_every_container_is_bounded_and_not_root(documents: list[dict[str, Any]]) -> None:
    spec, platform = documents
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in executors(spec).items():
        resources = executor["container"]["resources"]
        assert resources["resourceCpuRequest"]
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"]
        assert int(settings[name]["activeDeadlineSeconds"]) > 0
        assert settings[name]["securityContext"]["runAsNonRoot"] is True


def test_no_package_is_installed_at_run_time(documents: list[dict[str, Any]]) -> None:
    for executor in executors(documents[0]).values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_the_exit_handler_reports_whatever_happens(documents: list[dict[str, Any]]) -> None:
    trigger = tasks(documents[0])["report"]["triggerPolicy"]
    assert trigger["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_no_secret_value_is_in_the_spec(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    _, platform = documents
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        assert {secret["secretName"] for secret in executor["secretAsEnv"]} == {"k2-s3"}
