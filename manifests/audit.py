"""Known weaknesses of what is locked, and of the images: `make audit`.

    python manifests/audit.py [IMAGE ...]

The exit code is 1 when there are any. What cannot be looked at from here, for want of a network, the database or a
scanner, is said, and is no failure: whether there are any is then unknown.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.tools import CACHE

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-nodeps.lock")
PROGRAM = "pip-audit==2.10.1"
DATABASE = "https://api.osv.dev"
SCANNERS = {
    "trivy": ("image", "--quiet", "--exit-code", "1", "--severity", "HIGH,CRITICAL", "--ignore-unfixed"),
    "grype": ("--quiet", "--fail-on", "high", "--only-fixed"),
}
"""Program -> arguments before the image's name; a weakness without a fix is for the base image's makers."""


@dataclass(frozen=True)
class Outcome:
    """What was looked at, what was found, and why it could not be looked at."""

    what: str
    found: tuple[str, ...] = ()
    unknown: str = ""

    def __str__(self) -> str:
        if self.unknown:
            return f"NOT AUDITED  {self.what}: {self.unknown}"
        return "\n".join(f"found        {self.what}: {each}" for each in self.found) or f"clean        {self.what}"


def main(images: Sequence[str]) -> int:
    """Audit the locks and the images; 1 when something was found."""
    outcomes = [packages(), *(image(name) for name in images)]
    if not images:
        outcomes.append(Outcome("images", unknown="none is named; `make audit IMAGES=...` scans those that you built"))
    print("\n".join(map(str, outcomes)))
    return int(any(each.found for each in outcomes))


def packages(database: str = DATABASE) -> Outcome:
    """Of every locked distribution."""
    reason = unreachable(database)
    if reason:
        return Outcome("packages", unknown=f"{database} cannot be reached from here ({reason})")
    try:
        return audited([str(_program())])
    except (subprocess.CalledProcessError, OSError) as error:
        return Outcome("packages", unknown=f"{PROGRAM} cannot be installed ({error})")


def unreachable(url: str) -> str:
    """Why nothing answers at a URL; empty when something does, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""


def audited(program: Sequence[str]) -> Outcome:
    """What pip-audit says of the locks; it ends alike for weaknesses and failures of its own, so its report counts."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        locks = [option for lock in LOCKS for option in ("--requirement", str(ROOT / lock))]
        how = ["--no-deps", "--disable-pip", "--vulnerability-service", "osv", "--progress-spinner", "off"]
        command = [*program, *locks, *how, "--format", "json", "--output", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.exists():
            return Outcome("packages", unknown=(done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1])
        rows = json.loads(report.read_text())["dependencies"]
    weak = [
        f"{row['name']} {row['version']}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'no version yet'}"
        for row in rows
        for each in row.get("vulns", ())
    ]
    skipped = [row["name"] for row in rows if "skip_reason" in row]
    return Outcome("packages", tuple(weak), f"pip-audit skipped {', '.join(skipped)}" if skipped and not weak else "")


def image(name: str) -> Outcome:
    """Of an image, by whichever scanner is installed."""
    scanner = next((each for each in SCANNERS if shutil.which(each)), None)
    if scanner is None:
        return Outcome(name, unknown=f"no scanner is installed ({' or '.join(SCANNERS)})")
    done = subprocess.run([scanner, *SCANNERS[scanner], name], capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout.strip():
        return Outcome(name, unknown=(done.stderr.strip().splitlines() or [f"{scanner} said nothing"])[-1])
    return Outcome(name, (done.stdout.strip(),) if done.returncode else ())


def _program() -> Path:
    """pip-audit in an environment of its own, so that what it needs is not in ours."""
    folder = CACHE / PROGRAM.replace("==", "-")
    found = folder / "bin" / "pip-audit"
    if not found.exists():
        venv.create(folder, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, PROGRAM], check=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
