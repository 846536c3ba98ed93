"""What the tests in containers start by hand and stop by process: an image registry, dockerd, and changed sysctls."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from k2.processes import end_with_parent


@contextmanager
def daemon(
    command: Sequence[str], log: Path, ready: Callable[[], bool], *, stop: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    """A program that is ready meanwhile, and stopped afterwards.

    Raises:
        AssertionError: it ended, or was not ready in time; with the end of its log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=end_with_parent
        )
    try:
        wait(lambda: process.poll() is not None or ready(), 60, lambda: f"{command[0]}: {tail(log)}")
        assert process.poll() is None, f"{command[0]} ended: {tail(log)}"
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait(done: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    """Ask until it is so.

    Raises:
        AssertionError: it was not in time; says what `otherwise` returns.
    """
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not in {seconds:.0f} s: {otherwise()}"
        time.sleep(0.1)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def answers(*command: str) -> bool:
    """Whether a command succeeds."""
    return not subprocess.run(command, capture_output=True, check=False).returncode


def run(*command: str) -> str:
    """What a command prints.

    Raises:
        AssertionError: it fails; with what it says.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def registry(folder: Path, address: str) -> Iterator[str]:
    """An image registry at an address, `host:port`."""
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "blobs")}},
        "http": {"addr": address},
        "log": {"level": "warn", "accesslog": {"disabled": True}},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["docker-registry", "serve", str(folder / "config.yaml")]
    with (
        removed(folder / "blobs"),
        daemon(command, folder / "log", lambda: answers("curl", "-fs", f"http://{address}/v2/")),
    ):
        yield address


def push(image: str, name: str, address: str, folder: Path) -> str:
    """Put a built image into the registry; returns it by digest, as a deployment file names it."""
    written = folder / f"{name}.digest"
    target = f"docker://{address}/k2/{name}:e2e"
    # Nothing travels far here, so compressing a gigabyte would only cost time.
    run(
        *("buildah", "push", "--quiet", "--tls-verify=false", "--disable-compression"),
        f"--digestfile={written}",
        image,
        target,
    )
    return f"{address}/k2/{name}@{written.read_text().strip()}"


@contextmanager
def dockerd(folder: Path) -> Iterator[str]:
    """A Docker daemon with its own folders, which changes nothing of the machine's network; yields its address."""
    folder.mkdir(parents=True)
    config = {
        "data-root": str(folder / "data"),
        "exec-root": str(folder / "exec"),
        "pidfile": str(folder / "pid"),
        "hosts": [address := f"unix://{folder}/socket"],
        "cgroup-parent": "/k2-e2e",
        "bridge": "none",
        "iptables": False,
        "ip-forward": False,
        "ip-masq": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = ["dockerd", "--config-file", str(folder / "config.json")]
    with (
        removed(folder / "data"),
        daemon(command, folder / "log", lambda: answers("docker", "-H", address, "version")),
    ):
        yield address
    remove_cgroups("k2-e2e")


@contextmanager
def removed(folder: Path) -> Iterator[None]:
    """Free the disk afterwards: images are gigabytes, and pytest keeps the folders of several sessions."""
    try:
        yield
    finally:
        run("rm", "-rf", str(folder))


def remove_cgroups(name: str) -> None:
    """End what containers of an engine still run, and remove their control groups."""
    groups = sorted(Path("/sys/fs/cgroup").glob(f"*/{name}/**/"), reverse=True)
    pids = {pid for group in groups for pid in (group / "cgroup.procs").read_text().split()}
    for pid in pids:
        answers("kill", "-KILL", pid)
    wait(lambda: not any(Path("/proc", pid).exists() for pid in pids), 20, lambda: f"processes of {name} do not end")
    for group in groups:
        group.rmdir()


@contextmanager
def unchanged(*names: str) -> Iterator[None]:
    """Put sysctls back to what they were."""
    files = [Path("/proc/sys") / name.replace(".", "/") for name in names]
    before = [file.read_text() for file in files]
    try:
        yield
    finally:
        for file, value in zip(files, before, strict=True):
            file.write_text(value)
