"""Build K2's images with whichever of buildah, podman and docker is there.

    python images/build.py cpu                        localhost/k2/cpu:<tag>, the tag made from what goes in
    python images/build.py cpu --offline              wheels made on this machine; the build itself has no network
    python images/build.py cpu --offline --base debian     on a base made from this machine's own Debian packages

Prints the image's name. An image that is there already is not built again.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[1]
CACHE = Path.home() / ".cache" / "k2" / "images"
LOCKS = ("requirements.lock", "requirements-nodeps.lock", "pyproject.toml")
CONTEXT = (*LOCKS, "README.md", "LICENSE", "src", "components", "pipelines", "images/finish.py")
PACKAGES = "ca-certificates,git,python3,python3-pip,python3-venv"
DEBIAN = f"localhost/k2/python:3.11-debian12-{hashlib.sha256(PACKAGES.encode()).hexdigest()[:8]}"


def files() -> list[Path]:
    """What goes into an image: the tracked files of the context, as they are in the work tree."""
    listed = subprocess.run(["git", "ls-files", *CONTEXT], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(path for line in listed.stdout.splitlines() if (path := Path(line)) and (ROOT / path).is_file())


def content_tag(kind: str, base: str) -> str:
    """The same content on the same base has the same tag, whoever builds it."""
    digest = hashlib.sha256(base.encode())
    for path in [*files(), Path("images") / kind / "Dockerfile"]:
        digest.update(f"\0{path}\0".encode() + (ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


def engine() -> list[str]:
    """The command that builds; buildah's chroot isolation needs neither a daemon nor cgroups.

    Raises:
        SystemExit: none of the three is installed.
    """
    if shutil.which("buildah"):
        return ["buildah", "bud", "--isolation", "chroot", "--format", "docker", "--layers=false"]
    for name in ("podman", "docker"):
        if shutil.which(name):
            return [name, "build"]
    sys.exit("error: none of buildah, podman, docker is installed; on Debian: apt-get install buildah")


def exists(image: str) -> bool:
    """Whether the engine's storage has the image."""
    tool = engine()[0]
    return not subprocess.run([tool, "inspect", image], capture_output=True, check=False).returncode


def wheelhouse() -> Path:
    """Every wheel that the lock allows, made with this machine's pip; kept until a lock changes."""
    locks = b"".join((ROOT / name).read_bytes() for name in LOCKS)
    folder = CACHE / f"wheels-{hashlib.sha256(locks).hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", partial]
            subprocess.run([*pip, "--constraint", "requirements.lock", ".", "setuptools"], cwd=ROOT, check=True)
            subprocess.run([*pip, "--no-deps", "--requirement", "requirements-nodeps.lock"], cwd=ROOT, check=True)
            for built in Path(partial).glob("k2-*.whl"):
                built.unlink()
            shutil.copytree(partial, folder)
    return folder


def debian_base() -> str:
    """A base image with Python 3.11 from this machine's own package sources (Debian 12): no registry needed."""
    if not exists(DEBIAN):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            subprocess.run(_bootstrap(Path(folder) / "root.tar"), check=True, stdin=_sources())
            (Path(folder) / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
            subprocess.run([*engine(), "--tag", DEBIAN, folder], check=True, stdout=subprocess.DEVNULL)
    return DEBIAN


def _sources() -> BinaryIO:
    return Path("/etc/apt/sources.list.d/debian.sources").open("rb")


def _bootstrap(tar: Path) -> list[str]:
    left_out = ("path-exclude=/usr/share/man/*", "path-exclude=/usr/share/locale/*", "path-exclude=/usr/share/doc/*")
    clean = 'rm -rf "$1"/usr/lib/python3*/EXTERNALLY-MANAGED "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin'
    return [
        *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"),
        *(f"--dpkgopt={option}" for option in (*left_out, "path-include=/usr/share/doc/*/copyright")),
        *(f"--customize-hook={clean}", "bookworm", str(tar), "-"),
    ]


def build(kind: str, base: str, *, offline: bool) -> str:
    """Build one image and return its name."""
    image = f"localhost/k2/{kind}:{content_tag(kind, base)}"
    if exists(image):
        return image
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        for path in [*files(), Path("images") / kind / "Dockerfile"]:
            (context / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, context / path)
        command = [*engine(), "--tag", image, "--file", str(context / "images" / kind / "Dockerfile")]
        command += ["--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"REVISION={revision()}"]
        command += _offline(context) if offline else []
        subprocess.run([*command, folder], check=True, stdout=sys.stderr)
    return image


def _offline(context: Path) -> list[str]:
    """No network in the build: wheels come from a mounted folder, packages of the system from the base."""
    config = context / "pip.conf"
    config.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    volumes = ["--volume", f"{wheelhouse()}:/wheels:ro", "--volume", f"{config}:/etc/pip.conf:ro"]
    empty = ("BUILD_PACKAGES", "RUNTIME_PACKAGES", "TORCH_INDEX")
    return [*volumes, *(f"--build-arg={name}=" for name in empty)]


def revision() -> str:
    """The commit, for the label."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return head.stdout.strip()


def main() -> None:
    """Parse the command line, build, print the name."""
    parser = argparse.ArgumentParser(description="Build an image of K2.")
    parser.add_argument("kind", choices=["cpu", "gpu"])
    parser.add_argument("--base", default="python:3.11-slim-bookworm", help="image to build on; `debian` makes one")
    parser.add_argument("--offline", action="store_true", help="make the wheels here, build without network")
    chosen = parser.parse_args()
    base = debian_base() if chosen.base == "debian" else chosen.base
    print(build(chosen.kind, base, offline=chosen.offline))


if __name__ == "__main__":
    main()
