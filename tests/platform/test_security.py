"""No secret in the repository or in what it renders; dependencies are pinned, consistent, and of known licences."""

import re
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from k2.config.deployment import Deployment
from k2.platform.render import RECIPES, render
from manifests import contents
from manifests.contents import PATTERNS, normal, pins, secrets
from tests.manifests.render import ROOT, kustomize
from tests.platform.conftest import DEPLOYMENTS

SITE = Path(sysconfig.get_paths()["purelib"])
SAMPLES = {
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "AWS access key": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub token": "ghp_" + "a1" * 18,
    "GitLab token": "glpat-" + "a1b2" * 5,
    "Hugging Face token": "hf_" + "aB" * 17,
    "API key": "sk-" + "a1B2" * 8,
    "Slack token": "xoxb-" + "1234567890-abc",
    "Google API key": "AIza" + "a1B2c" * 7,
    "JSON web token": "eyJ" + "hbGciOiJIUzI1.eyJ" + "zdWIiOiIxMjM0.c2lnbmF0dXJl",
    "password in a URL": "https://me:" + "hunter22@host/x",
    "assigned secret": 'SECRET_KEY = "' + "a1b2c3d4e5f6a7b8c9d0" + '"',
}
PLANTED = {
    "K2_S3_SECRET_KEY": "planted-secret-77",
    "K2_S3_ACCESS_KEY": "planted-access-78",
    "K2_LLM_API_KEY": "planted-llm-key-79",
    "K2_METRICS_TOKEN": "planted-token-80",
}
KNOWN = {
    path: ["password in a URL"]
    for path in ("tests/generation/test_openai.py", "tests/platform/test_deployment.py", "tests/store/test_client.py")
}
"""These prove that such URLs are refused or masked."""


def committed() -> Iterator[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    yield from (ROOT / name for name in sorted(listed.split("\0")) if name and (ROOT / name).is_file())


@pytest.mark.parametrize("name", PATTERNS)
def test_the_scan_can_fail(name: str) -> None:
    assert name in secrets(f"x = 1\n{SAMPLES[name]}\n")
    assert secrets('key = "models/hidden_size"\nuri = "http://host:8333/bucket"\nsha256 = "' + "0f" * 32 + '"\n') == []


def test_the_repository_has_no_secret() -> None:
    leaks = {
        str(path.relative_to(ROOT)): names
        for path in committed()
        if (names := secrets(path.read_text(encoding="utf-8", errors="replace")))
    }
    assert leaks == KNOWN


@pytest.mark.parametrize("file", ["cpu.yaml", "gpu.yaml"])
def test_what_is_compiled_has_none_even_where_the_environment_has(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    deployment = Deployment.model_validate(yaml.safe_load((DEPLOYMENTS / file).read_text()))
    for pipeline in RECIPES:
        rendering = render(pipeline, deployment)
        text = rendering.ir() + rendering.resources("kubeflow", "")
        assert secrets(text) == []
        assert not [value for value in PLANTED.values() if value in text]
        assert "K2_S3_SECRET_KEY" in text, "it comes from a Secret, by name"


@pytest.mark.parametrize("overlay", ["dev", "prod", "profile"])
def test_manifests_bring_no_secret_but_name_them(overlay: str) -> None:
    objects = kustomize(f"manifests/overlays/{overlay}")
    assert not [each for each in objects if each["kind"] == "Secret"]
    assert secrets(yaml.safe_dump_all(objects)) == []


def test_the_lock_pins_everything_once_and_agrees_with_the_project() -> None:
    locked = [*pins("requirements.lock"), *pins("requirements-nodeps.lock")]
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.!+]*", version) for _, version in locked), "exact versions only"
    assert len({name for name, _ in locked}) == len(locked)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [
        *project["dependencies"],
        *(each for group in project["optional-dependencies"].values() for each in group),
    ]
    for each in direct:
        name, _, version = each.partition("==")
        assert dict(locked)[normal(name)] == version, each


def test_what_is_installed_is_what_the_lock_says_and_nothing_else() -> None:
    """So a bill of materials made from what is installed is one of the lock."""
    assert contents.unlocked(SITE) == []
    assert set(contents.locked()) <= set(contents.versions(SITE))


def test_every_dependency_states_a_licence_that_may_be_shipped() -> None:
    assert contents.unlicensed(SITE) == []
