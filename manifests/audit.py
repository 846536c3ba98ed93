"""What is installed and shipped, and its known weaknesses: `make audit`.

    python -m manifests.audit [--offline] [IMAGE ...]

The exit code is 1 when something is found, and 3 when nothing is but something could not be looked at, for want of a
network, the database, a scanner or the image. `--offline` looks only at what needs none of them, and says so.
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests import contents
from manifests.contents import LOCKS, ROOT
from manifests.tools import CACHE

PROGRAM = "pip-audit==2.10.1"
DATABASE = "https://api.osv.dev"
KNOWN = "known weaknesses of packages"
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


def main(arguments: Sequence[str]) -> int:
    """Audit what is installed, what is locked, and images."""
    parser = argparse.ArgumentParser(description="Audit dependencies and images.")
    parser.add_argument("--offline", action="store_true", help="leave out what needs a database of weaknesses")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="such as those that `make images` built")
    chosen = parser.parse_args(arguments)
    outcomes = [*environment(), *(each for name in chosen.images for each in inside(name))]
    if not chosen.offline:
        outcomes += [packages(), *(image(name) for name in chosen.images)]
    unasked = ["NOT ASKED    known weaknesses, of packages and of images: --offline"] if chosen.offline else []
    print("\n".join([*map(str, outcomes), *unasked]))
    return 1 if any(each.found for each in outcomes) else 3 if any(each.unknown for each in outcomes) else 0


def environment() -> Iterator[Outcome]:
    """Of what is installed here, from which the images' bills of materials are made."""
    site = Path(sysconfig.get_paths()["purelib"])
    yield Outcome("what is installed, against the lock", tuple(contents.unlocked(site)))
    yield Outcome("Python files, against the digests of their wheels", tuple(contents.altered(site)))
    yield Outcome("licences", tuple(contents.unlicensed(site)))


def inside(name: str) -> Iterator[Outcome]:
    """Of an image, what needs no scanner."""
    try:
        with contents.mounted(name) as (root, settings):
            site = contents.site_of(root)
            yield Outcome(f"{name}: what is installed, against the lock", tuple(contents.unlocked(site)))
            yield Outcome(f"{name}: Python files, against the digests of their wheels", tuple(contents.altered(site)))
            yield Outcome(f"{name}: licences", tuple(contents.unlicensed(site)))
            yield Outcome(f"{name}: bill of materials, against what is installed", tuple(contents.unlisted(root, site)))
            yield Outcome(f"{name}: secrets in settings and in K2's own files", tuple(contents.leaked(root, settings)))
    except LookupError as error:
        yield Outcome(f"{name}: what is in it", unknown=str(error))


def packages(database: str = DATABASE) -> Outcome:
    """Of every locked distribution."""
    reason = unreachable(database)
    if reason:
        return Outcome(KNOWN, unknown=f"{database} cannot be reached from here ({reason})")
    try:
        return audited([str(_program())])
    except (subprocess.CalledProcessError, OSError) as error:
        return Outcome(KNOWN, unknown=f"{PROGRAM} cannot be installed ({error})")


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
            return Outcome(KNOWN, unknown=(done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1])
        rows = json.loads(report.read_text())["dependencies"]
    weak = [
        f"{row['name']} {row['version']}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'no version yet'}"
        for row in rows
        for each in row.get("vulns", ())
    ]
    skipped = [row["name"] for row in rows if "skip_reason" in row]
    return Outcome(KNOWN, tuple(weak), f"pip-audit skipped {', '.join(skipped)}" if skipped and not weak else "")


def image(name: str) -> Outcome:
    """Of an image, by whichever scanner is installed."""
    what = f"{name}: known weaknesses"
    scanner = next((each for each in SCANNERS if shutil.which(each)), None)
    if scanner is None:
        return Outcome(what, unknown=f"no scanner is installed ({' or '.join(SCANNERS)})")
    done = subprocess.run([scanner, *SCANNERS[scanner], name], capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout.strip():
        return Outcome(what, unknown=(done.stderr.strip().splitlines() or [f"{scanner} said nothing"])[-1])
    return Outcome(what, (done.stdout.strip(),) if done.returncode else ())


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
