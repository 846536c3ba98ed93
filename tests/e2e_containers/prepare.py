"""Bring Debian's container tools and hadolint, and build images from Debian's own packages.

python -m tests.e2e_containers.prepare [KIND...]      gpu, cpu and store, or some; prints their names as variables
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from images import build
from manifests import tools

PACKAGES = (
    *("buildah", "conntrack", "containerd", "containernetworking-plugins", "curl", "dnsmasq-base", "docker-registry"),
    *("docker.io", "etcd-server", "iproute2", "iptables", "mmdebstrap", "openssl", "procps", "runc", "skopeo"),
)
VARIABLES = {"gpu": "K2_GPU_IMAGE", "cpu": "K2_IMAGE", "store": "K2_STORE_IMAGE"}
"""Kind of image -> its variable; the largest first, as a build needs four times its image on the disk."""


def install() -> None:
    """Install what is missing.

    Raises:
        SystemExit: this is no Debian, or not root.
        subprocess.CalledProcessError: apt failed.
    """
    if os.geteuid() != 0 or not build.SOURCES.exists():
        sys.exit("error: needs root on Debian 12, for its container tools and network namespaces")
    check = ["dpkg-query", "--show", "--showformat=${db:Status-Status}\n", *PACKAGES]
    known = subprocess.run(check, capture_output=True, text=True, check=False)
    if known.returncode or set(known.stdout.split()) != {"installed"}:
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600"]
        subprocess.run([*apt, "update"], check=True, stdout=sys.stderr)
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        command = [*apt, "install", "--yes", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, check=True, stdout=sys.stderr, env=quiet)


def linter() -> None:
    """Fetch hadolint, which reads the Dockerfiles; where it cannot be had, its test is skipped, and this says why."""
    try:
        tools.fetch("hadolint")
    except subprocess.CalledProcessError as error:
        print(f"hadolint cannot be fetched, so Dockerfiles are not linted: {error}", file=sys.stderr)


def packages(kind: str) -> str:
    """What the base of one kind of image has."""
    return build.GPU_PACKAGES if kind == "gpu" else build.PACKAGES


def ingredients(kinds: Iterable[str]) -> None:
    """Make the bases and the wheels, two at a time: each is made by one busy process and waits for the network."""
    with ThreadPoolExecutor(2) as pool:
        wheels = pool.submit(build.wheelhouse)
        list(pool.map(build.debian_base, {build.BUILD_PACKAGES, *map(packages, kinds)}))
        wheels.result()


if __name__ == "__main__":
    kinds = sys.argv[1:] or list(VARIABLES)
    install()
    linter()
    ingredients(kinds)
    for kind in kinds:
        base, build_base = build.debian_base(packages(kind)), build.debian_base(build.BUILD_PACKAGES)
        print(f"{VARIABLES[kind]}={build.build(kind, base, build_base, offline=True)}")
