"""No secret in the repository or in what it renders; dependencies are pinned, consistent, and of known licences."""

import importlib.metadata
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from k2.config.deployment import Deployment
from k2.platform.render import RECIPES, render
from tests.manifests.render import ROOT, kustomize
from tests.platform.conftest import DEPLOYMENTS

PATTERNS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9_]{40,}",
    "GitLab token": r"\bglpat-[A-Za-z0-9_-]{20}",
    "Hugging Face token": r"\bhf_[A-Za-z]{34}\b",
    "API key": r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{24,}",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "password in a URL": r"\b[a-z][a-z0-9+]*://[^\s/:@\"'{}<>*]+:[^\s/:@\"'{}<>*]{6,}@[a-z0-9]",
    "assigned secret": r"(?i)(?:secret|token|password|passwd|api_?key|access_?key)[a-z_]*[\"']?\s*[:=]\s*[\"']"
    r"(?=[^\"']*\d)(?=[^\"']*[A-Za-z])[A-Za-z0-9+/_=-]{20,}[\"']",
}
SCAN = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}
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
ALLOWED = re.compile(
    r"apache|\bmit\b|bsd|isc|psf|python software foundation|mpl|mozilla|zlib|unlicense|public domain|cc0|hpnd|cnri",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"\b(?:A?GPL|SSPL|EUPL)|proprietary|non-?commercial", re.IGNORECASE)
UNSTATED = {"zss"}
"""Packages whose metadata say nothing; their repository was read."""


def found(text: str) -> list[str]:
    """Which patterns a text has."""
    return [name for name, pattern in SCAN.items() if pattern.search(text)]


def committed() -> Iterator[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    yield from (ROOT / name for name in sorted(listed.split("\0")) if name and (ROOT / name).is_file())


@pytest.mark.parametrize("name", PATTERNS)
def test_the_scan_can_fail(name: str) -> None:
    assert name in found(f"x = 1\n{SAMPLES[name]}\n")
    assert found('key = "models/hidden_size"\nuri = "http://host:8333/bucket"\nsha256 = "' + "0f" * 32 + '"\n') == []


def test_the_repository_has_no_secret() -> None:
    leaks = {
        str(path.relative_to(ROOT)): names
        for path in committed()
        if (names := found(path.read_text(encoding="utf-8", errors="replace")))
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
        assert found(text) == []
        assert not [value for value in PLANTED.values() if value in text]
        assert "K2_S3_SECRET_KEY" in text, "it comes from a Secret, by name"


@pytest.mark.parametrize("overlay", ["dev", "prod", "profile"])
def test_manifests_bring_no_secret_but_name_them(overlay: str) -> None:
    objects = kustomize(f"manifests/overlays/{overlay}")
    assert not [each for each in objects if each["kind"] == "Secret"]
    assert found(yaml.safe_dump_all(objects)) == []


def pins(file: str) -> list[tuple[str, str]]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [(normal(line.partition("==")[0]), line.partition("==")[2]) for line in lines if line]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


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
    locked = dict([*pins("requirements.lock"), *pins("requirements-nodeps.lock")])
    installed = {normal(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
    other = {name: version for name, version in installed.items() if version.partition("+")[0] != locked.get(name)}
    assert set(other) <= {"k2", "pip", "setuptools", "wheel"}
    assert set(locked) <= set(installed)


def test_every_dependency_states_a_licence_that_may_be_shipped() -> None:
    unstated = set()
    for each in importlib.metadata.distributions():
        name, about = normal(each.metadata["Name"]), each.metadata
        classifiers = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
        stated = about.get("License-Expression") or " ".join([*classifiers, (about.get("License") or "")[:200]])
        assert not COPYLEFT.search(stated), f"{name}: {stated}"
        if not ALLOWED.search(stated):
            unstated.add(name)
    assert unstated - {"k2"} <= UNSTATED
