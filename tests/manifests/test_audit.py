"""The audit tells weaknesses from not having been able to look; stand-ins write what the real programs do."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from manifests import audit

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
        ([CLEAN], 0, "clean        packages"),
        (
            [CLEAN, WEAK],
            1,
            "found        packages: b 2: GHSA-x, fixed in 3\n"
            "found        packages: b 2: GHSA-y, fixed in no version yet",
        ),
        ([CLEAN, SKIPPED], 0, "NOT AUDITED  packages: pip-audit skipped c"),
        (None, 1, "NOT AUDITED  packages: no answer"),
    ],
)
def test_a_report_is_told_from_a_failure(rows: list[Any] | None, code: int, expected: str, tmp_path: Path) -> None:
    assert str(audit.audited(pip_audit(tmp_path, rows, code))) == expected


def test_without_the_database_nothing_is_claimed_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit.packages, "__defaults__", ("http://127.0.0.1:9",))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert audit.main(["localhost/k2/cpu:1"]) == 0
    said = capsys.readouterr().out
    assert "NOT AUDITED  packages: http://127.0.0.1:9 cannot be reached from here ([Errno 111]" in said
    assert "NOT AUDITED  localhost/k2/cpu:1: no scanner is installed (trivy or grype)" in said
    assert "clean" not in said


@pytest.mark.parametrize(
    ("script", "expected", "code"),
    [
        ("exit 0", "clean        localhost/k2/cpu:1", 0),
        ("echo openssl CVE-1 HIGH; exit 1", "found        localhost/k2/cpu:1: openssl CVE-1 HIGH", 1),
        ("echo no such database >&2; exit 1", "NOT AUDITED  localhost/k2/cpu:1: no such database", 0),
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
    assert audit.main(["localhost/k2/cpu:1"]) == code
    assert expected in capsys.readouterr().out
