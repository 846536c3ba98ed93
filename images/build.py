"""Build K2's images with whichever of buildah, podman and docker is there.

    python images/build.py cpu                        localhost/k2/cpu:<tag>, the tag made from what goes in
    python images/build.py cpu --offline              wheels made on this machine; the build itself has no network
    python images/build.py cpu --offline --base debian     on a base made from this machine's own Debian packages
    python images/build.py store                      the object store inside a cluster, by the same options

Prints the image's name. An image that is there already is not built again.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = Path.home() / ".cache" / "k2" / "images"
LOCKS = ("requirements.lock", "requirements-nodeps.lock", "pyproject.toml")
STAGES = (*LOCKS, "README.md", "LICENSE", "src", "components", "pipelines", "images/finish.py")
CONTEXT = {"cpu": STAGES, "gpu": STAGES, "store": ("requirements.lock",)}
"""Kind of image -> what goes in."""
PACKAGES = "ca-certificates,git,python3"
# Triton's launchers include Python's headers, which python:3.11-slim has.
GPU_PACKAGES = f"{PACKAGES},gcc,ibverbs-providers,libc6-dev,libibverbs1,libpython3.11-dev,librdmacm1"
BUILD_PACKAGES = "binutils,ca-certificates,gcc,libc6-dev,python3,python3-pip,python3-venv"
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
SHARED = ("bash-completion", "doc", "gitweb", "info", "lintian", "locale", "man")
LEFT_OUT = tuple(f"/usr/share/{name}/*" for name in SHARED)
LIBRARIES = (
    *(
        "apt",
        "curl-gnutls",
        "db",
        "gcrypt",
        "gnutls",
        "hogweed",
        "idn2",
        "ldap",
        "nettle",
        "nghttp2",
        "p11-kit",
        "perl",
    ),
    *("psl", "rtmp", "sasl2", "semanage", "sepol", "systemd", "unistring"),
)
REMOVED = (
    *("/usr/lib/python3*/EXTERNALLY-MANAGED", "/var/lib/apt/lists/*", "/var/cache/apt/*.bin", "/var/cache/debconf/*"),
    # Perl, apt, tools for disks and accounts, and conversions between character sets: nothing is installed any more.
    *("/usr/share/perl*", "/usr/lib/*/perl*", "/usr/bin/perl*", "/usr/bin/apt*", "/usr/bin/gpgv", "/usr/lib/apt"),
    *("/usr/lib/*/gconv", "/usr/share/zoneinfo/right", "/usr/share/zoneinfo/posix", "/usr/sbin/[a-km-z]*"),
    *(f"/usr/lib/*/lib{name}[.-]*" for name in LIBRARIES),
    # What git needs to reach or to be a server: K2 uses it on local repositories.
    *("/usr/bin/scalar", "/usr/bin/git-shell", "/usr/lib/git-core/scalar", "/usr/lib/git-core/git-sh*"),
    *(f"/usr/lib/git-core/git-{name}" for name in ("daemon", "http-*", "imap-send", "remote-*")),
)

Done = subprocess.CompletedProcess[str]
UNSEALED = "sealing memfd copy: Device or resource busy"
"""Buildah starts every command of a container through a sealed copy of itself in memory. While the kernel still holds a
page of the copy, as a busy machine's may for longer than it waits, the seal is refused and no command has started."""


def files(kind: str) -> list[Path]:
    """What goes into an image: the tracked files of the context, as they are in the work tree."""
    listed = subprocess.run(["git", "ls-files", *CONTEXT[kind]], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(path for line in listed.stdout.splitlines() if (path := Path(line)) and (ROOT / path).is_file())


def content_tag(kind: str, base: str) -> str:
    """The same content on the same base has the same tag, whoever builds it."""
    digest = hashlib.sha256(base.encode())
    for path in [*files(kind), Path("images") / kind / "Dockerfile"]:
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


def started(run: Callable[[], Done], attempts: int = 5) -> Done:
    """The first outcome of `run`, or that of the last attempt, in which buildah was not refused its sealed copy."""
    for attempt in range(1, attempts):
        done = run()
        if not done.returncode or UNSEALED not in done.stderr:
            return done
        print(f"warning: {UNSEALED}; attempt {attempt + 1} of {attempts}", file=sys.stderr)
        time.sleep(attempt)
    return run()


def echoed(command: list[str]) -> Done:
    """Run a command; what it prints goes to standard error as it comes, and into `stderr`."""
    said = []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace") as running:
        for line in running.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line)
    return Done(command, running.returncode, stderr="".join(said))


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
            Path(partial).rename(folder)
    return folder


def debian_name(packages: str) -> str:
    """Name of the base image that has these packages."""
    content = "\n".join((packages, *LEFT_OUT, *REMOVED)).encode()
    return f"localhost/k2/python:3.11-debian12-{hashlib.sha256(content).hexdigest()[:8]}"


def debian_base(packages: str) -> str:
    """A base image with Python 3.11 from this machine's own package sources (Debian 12): no registry needed."""
    image = debian_name(packages)
    if not exists(image):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder, SOURCES.open("rb") as sources:
            subprocess.run(_bootstrap(packages, Path(folder) / "root.tar"), check=True, stdin=sources)
            (Path(folder) / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
            subprocess.run([*engine(), "--tag", image, folder], check=True, stdout=subprocess.DEVNULL)
    return image


def _bootstrap(packages: str, tar: Path) -> list[str]:
    clean = " ".join(("rm -rf", *(f'"$1"{path}' for path in REMOVED)))
    return [
        *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}"),
        *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
        *("--dpkgopt=path-include=/usr/share/doc/*/copyright", f"--customize-hook={clean}", "bookworm", str(tar), "-"),
    ]


def build(kind: str, base: str, build_base: str, *, offline: bool) -> str:
    """Build one image and return its name; `build_base` has what only the build needs.

    Raises:
        SystemExit: the engine failed.
    """
    image = f"localhost/k2/{kind}:{content_tag(kind, base)}"
    if exists(image):
        return image
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        for path in [*files(kind), Path("images") / kind / "Dockerfile"]:
            (context / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, context / path)
        command = [*engine(), "--tag", image, "--file", str(context / "images" / kind / "Dockerfile")]
        arguments = {"BASE_IMAGE": base, "BUILD_IMAGE": build_base, "REVISION": revision()}
        command += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        command += _offline(context) if offline else []
        if started(lambda: echoed([*command, folder])).returncode:
            sys.exit(f"error: {command[0]} did not build {image}, and says why above; it takes four times its size")
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
    parser.add_argument("kind", choices=CONTEXT)
    parser.add_argument("--base", default="python:3.11-slim-bookworm", help="image to build on; `debian` makes one")
    parser.add_argument("--offline", action="store_true", help="make the wheels here, build without network")
    chosen = parser.parse_args()
    base = build_base = chosen.base
    if chosen.base == "debian":
        base = debian_base(GPU_PACKAGES if chosen.kind == "gpu" else PACKAGES)
        build_base = debian_base(BUILD_PACKAGES)
    print(build(chosen.kind, base, build_base, offline=chosen.offline))


if __name__ == "__main__":
    main()
