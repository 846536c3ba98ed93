"""What an audit sees without a network: the distributions installed here or in an image, and an image's own files."""

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution
from importlib.metadata import distributions as installed
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-nodeps.lock")
OUTSIDE = frozenset({"k2", "pip", "setuptools", "wheel"})
"""What no lock names: the project, and what installs it."""

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
ALLOWED = re.compile(
    r"apache|\bmit\b|bsd|isc|psf|python software foundation|mpl|mozilla|zlib|unlicense|public domain|cc0|hpnd|cnri",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"\b(?:A?GPL|SSPL|EUPL)|proprietary|non-?commercial", re.IGNORECASE)
UNSTATED = frozenset({"zss"})
"""Packages whose metadata say nothing; their repository was read."""

FOLDERS = (
    *(f"opt/k2/lib/*/site-packages/{package}" for package in ("k2", "components", "pipelines")),
    *("etc", "home", "root", "srv", "tmp", "opt/k2/*.json", "opt/k2/*.cfg"),
)
"""Of an image, what is neither a locked wheel's nor a package's of the system."""


def secrets(text: str) -> list[str]:
    """Which patterns of credentials a text has."""
    return [name for name, pattern in SCAN.items() if pattern.search(text)]


def normal(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> list[tuple[str, str]]:
    """Name and version of each line of a lock file."""
    lines = [line.split("#")[0].strip() for line in (ROOT / lock).read_text().splitlines()]
    return [(normal(line.partition("==")[0]), line.partition("==")[2]) for line in lines if line]


def locked() -> dict[str, str]:
    """Name -> version, of all locks."""
    return dict(pin for lock in LOCKS for pin in pins(lock))


def versions(site: Path) -> dict[str, str]:
    """Name -> version, of what is installed in a folder."""
    return {normal(each.metadata["Name"]): each.version for each in installed(path=[str(site)])}


def unlocked(site: Path) -> list[str]:
    """What is installed and not locked, or in another version; a build's own label, as in 2.13.0+cpu, is none."""
    lock = locked()
    return [
        f"{name} {version} is not the locked {lock.get(name, 'nothing')}"
        for name, version in sorted(versions(site).items())
        if name not in OUTSIDE and version.partition("+")[0] != lock.get(name)
    ]


def altered(site: Path) -> list[str]:
    """Python files that are not as their wheel brought them. Images leave files out, and libraries are stripped."""
    return [name for each in installed(path=[str(site)]) for name in _altered(each, site)]


def _altered(each: Distribution, site: Path) -> Iterator[str]:
    for name, digest, _ in csv.reader((each.read_text("RECORD") or "").splitlines()):
        path, (kind, _, expected) = site / name, digest.partition("=")
        if name.endswith(".py") and expected and path.is_file():
            found = base64.urlsafe_b64encode(hashlib.new(kind, path.read_bytes()).digest()).decode().rstrip("=")
            if found != expected:
                yield f"{name} is not as {each.metadata['Name']} {each.version} has it"


def unlicensed(site: Path) -> list[str]:
    """Distributions whose licence may not be shipped, or is not stated."""
    found = []
    for each in installed(path=[str(site)]):
        name, about = normal(each.metadata["Name"]), each.metadata
        classifiers = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
        stated = about.get("License-Expression") or " ".join([*classifiers, (about.get("License") or "")[:200]])
        if COPYLEFT.search(stated) or not (ALLOWED.search(stated) or name in UNSTATED | OUTSIDE):
            found.append(f"{name}: {stated.strip() or 'states no licence'}")
    return sorted(found)


def unlisted(root: Path, site: Path) -> list[str]:
    """What the bill of materials of an image has and the image has not, or the other way round."""
    components = json.loads((root / "opt" / "k2" / "sbom.json").read_text())["components"]
    told = {normal(each["name"]): each["version"] for each in components}
    return [f"{name}: listed {told.get(name)}, installed {there}" for name, there in _differing(told, versions(site))]


def _differing(told: dict[str, str], there: dict[str, str]) -> list[tuple[str, str | None]]:
    return [(name, there.get(name)) for name in sorted({*told, *there}) if told.get(name) != there.get(name)]


def leaked(root: Path, settings: str) -> list[str]:
    """Credentials in an image's settings (variables, labels, history) and in the files that are its own."""
    found = [f"settings: {kind}" for kind in secrets(settings)]
    for path in sorted(path for pattern in FOLDERS for folder in root.glob(pattern) for path in _files(folder)):
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(root)}: {kind}" for kind in secrets(text)]
    return found


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, or the file that it is; links may lead out of the image."""
    below = folder.rglob("*") if folder.is_dir() else (folder,)
    yield from (path for path in below if path.is_file() and not path.is_symlink())


@contextmanager
def mounted(image: str) -> Iterator[tuple[Path, str]]:
    """An image's files, and its settings as JSON.

    Raises:
        LookupError: there is no buildah, or no such image here; the reason in one line.
    """
    if shutil.which("buildah") is None:
        raise LookupError("buildah is not installed")
    made = subprocess.run(["buildah", "from", "--pull-never", image], capture_output=True, text=True, check=False)
    if made.returncode:
        raise LookupError(made.stderr.strip().splitlines()[-1])
    container = made.stdout.strip()
    try:
        yield Path(_buildah("mount", container).strip()), _buildah("inspect", "--type", "image", image)
    finally:
        _buildah("rm", container)


def _buildah(*arguments: str) -> str:
    return subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=True).stdout


def site_of(root: Path) -> Path:
    """The folder of distributions in one of K2's images."""
    return next(root.glob("opt/k2/lib/python3*/site-packages"))
