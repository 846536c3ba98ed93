"""The commands of docs/platform.md: those that need no cluster run, of the others the files and options are checked."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from k2.cli import main
from k2.config.deployment import Deployment
from manifests import tools
from tests.manifests.render import ROOT, kustomize, tool

PAGES = ("platform", "monitoring", "security")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "platform.md").read_text(), re.DOTALL)
    for line in block.strip().splitlines()
]


PROOFS = {
    "python images/build.py cpu": "tests/e2e_containers/test_dag.py::test_every_step_is_done",
    "python images/build.py gpu": "tests/images/test_images.py::test_structure",
    "python images/build.py store": "tests/e2e_k8s/test_platform.py::test_the_store_inside_keeps_objects",
    "k2 images list": "tests/images/test_images_command.py::test_list_prints_every_image_by_digest",
    "k2 images mirror": "tests/images/test_images_command.py::test_mirror_copies_and_prints_what_the_deployment",
    "kubectl apply --server-side -k manifests/admin": "tests/manifests/test_manifests.py::test_every_object_is_valid",
    "kubectl -n kubeflow create secret": "tests/manifests/test_docs_platform.py::test_commands_work",
    "kubectl kustomize": "tests/manifests/test_docs_platform.py::test_commands_work",
    "kubectl apply --server-side -k manifests/overlays/dev": "tests/e2e_k8s/test_platform.py::test_the_cluster_took",
    "helm install": "tests/manifests/test_first_pipeline.py::test_what_the_upload_runs_puts_the_pipelines_there",
    "k2 pipeline compile": "tests/manifests/test_docs_platform.py::test_commands_work",
    "kubectl apply --server-side --filename compiled": "tests/manifests/test_manifests.py::test_compiled_pipelines_are",
    "k2 doctor": "tests/e2e_k8s/test_platform.py::test_doctor_finds_the_account_complete",
    "k2 pipeline submit": "tests/platform/test_api.py::test_from_nothing_to_a_finished_run",
    "k2 gc plan": "tests/store/test_gc.py::test_on_the_command_line",
    "k2 gc apply": "tests/store/test_gc.py::test_on_the_command_line",
}
"""Beginning of a documented command -> file and beginning of the test that runs it, or what it applies."""
SHOWN = [
    line.removeprefix("$ ")
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", (ROOT / "docs" / "platform.md").read_text(), re.DOTALL)
    for line in block.strip().splitlines()
]


@pytest.mark.parametrize("command", SHOWN)
def test_every_command_of_the_page_is_exercised(command: str) -> None:
    (proof,) = [proof for start, proof in PROOFS.items() if command.startswith(start)]
    file, _, test = proof.partition("::")
    assert f"def {test}" in (ROOT / file).read_text()


def test_no_proof_is_of_a_command_that_the_page_does_not_have() -> None:
    assert [start for start in PROOFS if not any(command.startswith(start) for command in SHOWN)] == []


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    if program == "kubectl" and "-k" in arguments:
        assert kustomize(arguments[arguments.index("-k") + 1])
    elif program == "kubectl" and "kustomize" in arguments:
        assert run(tool("kubectl"), *arguments)
    elif program == "kubectl" and "--filename" in arguments:
        assert (ROOT / "pipelines" / arguments[-1]).exists(), "the same file of the fixture deployment"
    elif program == "kubectl":
        secret = yaml.safe_load(run(tool("kubectl"), *arguments, "--dry-run=client", "--output=yaml"))
        store = {f"K2_S3_{key}" for key in ["ENDPOINT", "BUCKET", "PREFIX", "ACCESS_KEY", "SECRET_KEY"]}
        assert set(secret["data"]) == ({"token"} if secret["metadata"]["name"] == "k2-metrics" else store)
    elif program == "helm":
        assert run(tool("helm"), "template", *arguments[1:])
    elif program == "python":
        assert "--offline" in run(sys.executable, arguments[0], "--help")
        assert arguments[1] in run(sys.executable, arguments[0], "--help")
    elif arguments[:2] == ["pipeline", "compile"]:
        run(sys.executable, "-m", "k2.cli", *arguments[:-1], str(tmp_path))
        assert (tmp_path / "k2.yaml").exists()
    else:
        parses(program, arguments)


def parses(program: str, arguments: list[str]) -> None:
    assert program == "k2"
    group: click.Command = main
    context = click.Context(main)
    while isinstance(group, click.Group):
        _, found, arguments = group.resolve_command(context, arguments)
        assert found is not None
        group = found
    made = group.make_context(group.name, list(arguments), parent=context)
    for value in made.params.values():
        if isinstance(value, Path):
            Deployment.model_validate(yaml.safe_load((ROOT / value).read_text()))


def test_the_page_shows_commands() -> None:
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("page", PAGES)
def test_files_and_components_that_pages_name_exist(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for path in re.findall(r"`((?:manifests|charts|images|pipelines|src)/[A-Za-z0-9_./-]+)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_runbooks_link_to_what_exists() -> None:
    for page in (ROOT / "docs" / "runbooks").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target


def test_tools_are_pinned_by_hash() -> None:
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", pin) for pin in tools.WHEELS.values())
