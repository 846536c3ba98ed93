"""The audit tells weaknesses from not having been able to look; stand-ins write what the real programs do."""

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from manifests import audit, contents

CLEAN = {"name": "a", "version": "1", "vulns": []}
WEAK = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "GHSA-x", "fix_versions": ["3"]}, {"id": "GHSA-y", "fix_versions": []}],
}
SKIPPED = {"name": "c", "skip_reason": "not found"}


def pip_audit(folder: Path, rows: list[Any] | None, code: int) -> list[str]:
    """A program that takes pip-audit's options, writes its report, and ends as it does."""
    script, report = folder / "pip_audit.py", json.dumps({"dependencies": rows})
    write = f"open(sys.argv[sys.argv.index('--output') + 1], 'w').write({report!r})"
    fail = "print('no answer', file=sys.stderr)"
    script.write_text(f"import sys\n{fail if rows is None else write}\nsys.exit({code})")
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("rows", "code", "expected"),
    [
        ([CLEAN], 0, "clean        known weaknesses of packages"),
        (
            [CLEAN, WEAK],
            1,
            "found        known weaknesses of packages: b 2: GHSA-x, fixed in 3\n"
            "found        known weaknesses of packages: b 2: GHSA-y, fixed in no version yet",
        ),
        ([CLEAN, SKIPPED], 0, "NOT AUDITED  known weaknesses of packages: pip-audit skipped c"),
        (None, 1, "NOT AUDITED  known weaknesses of packages: no answer"),
    ],
)
def test_a_report_is_told_from_a_failure(rows: list[Any] | None, code: int, expected: str, tmp_path: Path) -> None:
    assert str(audit.audited(pip_audit(tmp_path, rows, code))) == expected


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the database, a scanner and buildah."""
    monkeypatch.setattr(audit.packages, "__defaults__", ("http://127.0.0.1:9",))
    monkeypatch.setattr(audit, "environment", list)
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.mark.usefixtures("nowhere")
def test_what_could_not_be_looked_at_is_said_and_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["localhost/k2/cpu:1"]) == 3
    said = capsys.readouterr().out
    assert (
        "NOT AUDITED  known weaknesses of packages: http://127.0.0.1:9 cannot be reached from here ([Errno 111]" in said
    )
    assert "NOT AUDITED  localhost/k2/cpu:1: what is in it: buildah is not installed" in said
    assert "NOT AUDITED  localhost/k2/cpu:1: known weaknesses: no scanner is installed (trivy or grype)" in said
    assert "clean" not in said


@pytest.mark.usefixtures("nowhere")
def test_offline_leaves_out_the_database_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--offline"]) == 0
    assert capsys.readouterr().out == "NOT ASKED    known weaknesses, of packages and of images: --offline\n"


@pytest.mark.parametrize(
    ("script", "expected", "code"),
    [
        ("exit 0", "clean        localhost/k2/cpu:1: known weaknesses", 0),
        ("echo openssl CVE-1 HIGH; exit 1", "found        localhost/k2/cpu:1: known weaknesses: openssl CVE-1 HIGH", 1),
        ("echo no such database >&2; exit 1", "NOT AUDITED  localhost/k2/cpu:1: known weaknesses: no such database", 3),
    ],
)
def test_images_are_scanned_by_what_is_installed(
    script: str, expected: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "trivy").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "trivy").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(audit, "packages", lambda: audit.Outcome("packages"))
    monkeypatch.setattr(audit, "environment", list)
    monkeypatch.setattr(audit, "inside", lambda name: ())
    assert audit.main(["localhost/k2/cpu:1"]) == code
    assert expected in capsys.readouterr().out


# What is seen without a network.


def distribution(site: Path, name: str, version: str, licence: str, text: str = "x = 1\n") -> Path:
    """One that a wheel installed, with a file of its own; returns the file."""
    file, info = site / f"{name}.py", site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    file.write_text(text)
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense: {licence}\n")
    (info / "RECORD").write_text(f"{name}.py,sha256={digest},6\n{name}-{version}.dist-info/RECORD,,\n")
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of an image with two locked distributions, the project, and a bill of materials."""
    site = tmp_path / "opt/k2/lib/python3.11/site-packages"
    for name in ("kfp", "numpy"):
        distribution(site, name, contents.locked()[name], "MIT")
    distribution(site, "k2", "0.1.0", "Apache-2.0")
    (site / "k2").mkdir()
    listed = [{"name": name, "version": version} for name, version in contents.versions(site).items()]
    (tmp_path / "opt/k2/sbom.json").write_text(json.dumps({"components": listed}))
    return tmp_path


def problems(root: Path, settings: str = "") -> list[str]:
    site = contents.site_of(root)
    found = [contents.unlocked(site), contents.altered(site), contents.unlicensed(site)]
    found += [contents.unlisted(root, site), contents.leaked(root, settings)]
    return [problem for each in found for problem in each]


def test_an_image_as_it_was_built_is_clean(root: Path) -> None:
    assert problems(root) == []


def test_each_problem_of_an_image_is_found(root: Path) -> None:
    site = contents.site_of(root)
    (site / "numpy.py").write_text("x = 2\n")
    distribution(site, "stranger", "6.6", "GPL-3.0")
    (site / "k2" / "left.py").write_text("AWS = '" + "AKIA" + "IOSFODNN7EXAMPLE'")
    assert problems(root, "K2_S3_SECRET_KEY: '" + "a1b2c3d4e5f6a7b8c9d0" + "'") == [
        "stranger 6.6 is not the locked nothing",
        f"numpy.py is not as numpy {contents.locked()['numpy']} has it",
        "stranger: GPL-3.0",
        "stranger: listed None, installed 6.6",
        "settings: assigned secret",
        "opt/k2/lib/python3.11/site-packages/k2/left.py: AWS access key",
    ]
