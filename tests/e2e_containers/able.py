"""Whether this machine can run containers at all: prints what it lacks, on one line, or nothing.

    python -m tests.e2e_containers.able

Brings Debian's container tools, and has a Docker daemon of its own run a static program that every Debian has.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.e2e_containers.daemons import answers, dockerd, run
from tests.e2e_containers.prepare import install

PROGRAM = "/sbin/ldconfig"
NAMESPACES = ("unshare", "--net", "--mount", "sh", "-c", "ip link set lo up && mount -t tmpfs none /mnt")
WORK = (Path("/tmp"), Path("/var/tmp"), Path("/var/lib"), Path.home())
FREE_BYTES = 14_000_000_000
"""What building the images and running the CPU image takes at its most, and a quarter more."""


def missing() -> str:
    """What this machine lacks; empty when it can run containers."""
    free = {folder: shutil.disk_usage(folder).free for folder in WORK if folder.exists()}
    folder = min(free, key=lambda each: free[each])
    if free[folder] < FREE_BYTES:
        return f"{FREE_BYTES / 1e9:.0f} GB of free disk: {folder} has {free[folder] / 1e9:.1f}"
    try:
        install()
    except (SystemExit, subprocess.CalledProcessError) as error:
        return f"the tools: {error}"
    if not answers(*NAMESPACES):
        return "the right to make namespaces and mounts"
    try:
        with tempfile.TemporaryDirectory() as folder, dockerd(Path(folder) / "engine") as engine:
            _run_container(engine, Path(folder) / "root.tar")
    except AssertionError as error:
        return f"what Docker needs: {' '.join(str(error).split())[-300:]}"
    return ""


def _run_container(engine: str, tar: Path) -> None:
    """As the steps of a pipeline run: not root, read-only, without network.

    Raises:
        AssertionError: it does not run.
    """
    run("tar", "--create", "--dereference", f"--file={tar}", "--directory=/", PROGRAM.lstrip("/"))
    run("docker", "-H", engine, "import", str(tar), "k2-probe")
    options = ("--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--user=1000:1000", "--cap-drop=ALL")
    run("docker", "-H", engine, "run", *options, "k2-probe", PROGRAM, "--version")


if __name__ == "__main__":
    sys.stdout.write(missing())
