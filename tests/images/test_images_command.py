"""`k2 images` with a skopeo that writes down what it is asked for."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from k2.cli import main
from tests.manifests.render import ROOT, kustomize, pod_templates

DEPLOYMENT = str(ROOT / "pipelines" / "deployments" / "gpu.yaml")


def k2(*arguments: str, deployment: str = DEPLOYMENT) -> Result:
    return CliRunner().invoke(main, ["images", *arguments, "--deployment", deployment])


@pytest.fixture
def skopeo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A skopeo that fails for the second image when the file `fail` is there."""
    log = tmp_path / "log"
    failing = f'case "$*" in *gpu*) test ! -e {tmp_path}/fail || {{ echo denied >&2; exit 1; }};; esac'
    script = f'#!/bin/sh\necho "$@" >> {log}\n{failing}\n'
    (tmp_path / "skopeo").write_text(script)
    (tmp_path / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return log


def test_list_prints_every_image_by_digest() -> None:
    lines = k2("list").output.split()
    assert [line.partition("@sha256:")[0] for line in lines] == ["registry.example/k2/cpu", "registry.example/k2/gpu"]
    assert set(json.loads(k2("list", "--json").output)) == {"cpu", "gpu"}


@pytest.mark.parametrize("overlay", ["dev", "prod", "profile"])
def test_no_object_pulls_an_image_that_is_not_listed(overlay: str) -> None:
    """Uploads, the store and training runtimes run the images of the deployment file too; jobs take theirs from it."""
    listed = k2("list", deployment=str(ROOT / "manifests" / "overlays" / overlay / "deployment.yaml")).output.split()
    admin = {"profile": "profile"}.get(overlay, "standalone")
    objects = (*kustomize(f"manifests/overlays/{overlay}"), *kustomize(f"manifests/admin/overlays/{admin}"))
    pods = [template["spec"] for thing in objects for template in pod_templates(thing)]
    used = {each["image"] for pod in pods for each in (*pod["containers"], *pod.get("initContainers", []))}
    assert used
    assert used <= set(listed)


def test_mirror_copies_and_prints_what_the_deployment_file_then_says(skopeo: Path) -> None:
    result = k2("mirror", "--to", "registry.internal/ml/")
    assert result.exit_code == 0, result.output
    digest = "sha256:" + "1" * 64
    assert f"  cpu: registry.internal/ml/cpu@{digest}\n" in result.output
    first = skopeo.read_text().splitlines()[0]
    assert first == (
        f"copy --all --preserve-digests docker://registry.example/k2/cpu@{digest} "
        f"docker://registry.internal/ml/cpu:{'1' * 12}"
    )


def test_a_dry_run_copies_nothing(skopeo: Path) -> None:
    assert k2("mirror", "--to", "r.internal", "--dry-run").exit_code == 0
    assert not skopeo.exists()


def test_a_copy_that_fails_is_named(skopeo: Path) -> None:
    skopeo.with_name("fail").touch()
    result = k2("mirror", "--to", "r.internal")
    assert result.exit_code == 1
    assert "k2/gpu" in result.output
    assert "denied" in result.output


def test_without_skopeo_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = k2("mirror", "--to", "r.internal")
    assert result.exit_code == 2
    assert "k2 images list" in result.output
