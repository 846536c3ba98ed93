"""Kubernetes 1.20.2 from Debian's source package: the newest whose whole tree this machine's package sources hold.

    python -m tests.e2e_k8s.build      prints the folder of the five binaries; the first time takes 12 CPU minutes

The vendored reflect2 crashes under the Go that is there, at the first custom resource, so Debian's own takes its place.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from images.build import SOURCES

SOURCE = "1.20.5+really1.20.2-1.1+deb12u1"
REFLECT2 = "golang-github-modern-go-reflect2-dev"
BINARIES = ("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubelet")
PACKAGES = ("dpkg-dev", "golang-1.19-go", "golang-1.19-src", "golang-go", "golang-src", "jq", "rsync")
CACHE = Path.home() / ".cache" / "k2"
KUBERNETES = CACHE / "k8s-1.20.2-deb12u1"
APT = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600")


def built() -> bool:
    """Whether the cache has every binary."""
    return all((KUBERNETES / name).exists() for name in BINARIES)


def build() -> Path:
    """The folder with the binaries, which are built when they are not there.

    Raises:
        subprocess.CalledProcessError: apt, dpkg or the Go compiler failed.
    """
    if not built():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="k8s-build-") as work:
            tree = _source(Path(work))
            _compile(tree, Path(work))
            _keep(tree / "_output" / "local" / "bin" / "linux" / "amd64")
    return KUBERNETES


def _source(work: Path) -> Path:
    """The source tree with Debian's patches, and with a reflect2 that this Go can run."""
    for folder in ("parts", "lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    lines = SOURCES.read_text().splitlines()
    sources = ["Types: deb deb-src" if line.startswith("Types:") else line for line in lines]
    (work / "parts" / "src.sources").write_text("\n".join(sources) + "\n")
    places = {"SourceList": "/dev/null", "SourceParts": work / "parts"}
    apt = [*APT, "-o", f"Dir::State::Lists={work}/lists", "-o", f"Dir::Cache={work}/cache"]
    apt += [part for name, value in places.items() for part in ("-o", f"Dir::Etc::{name}={value}")]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "install", "--yes", "--no-install-recommends", *PACKAGES], check=True)
    subprocess.run([*apt, "source", f"kubernetes={SOURCE}"], cwd=work, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*apt, "download", REFLECT2], cwd=work, check=True)
    subprocess.run(["dpkg", "-x", next(work.glob(f"{REFLECT2}*.deb")), work / "root"], check=True)
    (tree,) = [path for path in work.glob("kubernetes-*") if path.is_dir()]
    vendored = tree / "vendor" / "github.com" / "modern-go" / "reflect2"
    shutil.rmtree(vendored)
    tests = shutil.ignore_patterns("*_test.go")
    shutil.copytree(work / "root" / "usr/share/gocode/src/github.com/modern-go/reflect2", vendored, ignore=tests)
    return tree


def _compile(tree: Path, work: Path) -> None:
    link = tree / ".go" / "src" / "k8s.io" / "kubernetes"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../..")
    go = {"GOPATH": str(tree / ".go"), "CGO_ENABLED": "0", "GO111MODULE": "off", "GOPROXY": "off"}
    version = {"VERSION": "v1.20.2", "MAJOR": "1", "MINOR": "20", "COMMIT": "debian", "TREE_STATE": "clean"}
    # hack/ takes a GOFLAGS of the caller for build tags.
    environment = {name: value for name, value in os.environ.items() if name != "GOFLAGS"} | go | {"HOME": str(work)}
    environment |= {f"KUBE_GIT_{name}": value for name, value in version.items()}
    what = " ".join(f"cmd/{name}" for name in BINARIES)
    log = CACHE / "k8s-build.log"
    print(f"building {what}: {log}", flush=True)
    with log.open("wb") as output:
        subprocess.run(["make", f"WHAT={what}"], cwd=tree, env=environment, check=True, stdout=output, stderr=output)


def _keep(folder: Path) -> None:
    """Move the binaries into the cache at once: a build that was stopped leaves nothing that looks whole."""
    partial = folder.parent / "kept"
    partial.mkdir()
    for name in BINARIES:
        (folder / name).rename(partial / name)
    KUBERNETES.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(KUBERNETES)


if __name__ == "__main__":
    print(build())
