"""The embedded server: private, joinable, and gone when nobody uses it."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2.errors import UserError
from k2.store import embedded
from k2.store.embedded import embedded_server

HOLD = "import sys, time\nfrom pathlib import Path\nfrom k2.store.embedded import embedded_server\n" + (
    "with embedded_server(Path(sys.argv[1])) as s:\n    print(s.endpoint, flush=True)\n    time.sleep(600)\n"
)


def gone(pid: int, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_second_user_joins_and_the_last_one_ends_it(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as first:
        other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline().strip() == first.endpoint
    time.sleep(1.0)
    assert not gone(first.supervisor, 0.1)
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    assert gone(first.supervisor)


def test_it_is_private_and_keeps_its_data(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as server:
        assert server.endpoint.startswith("http://127.0.0.1:")
        for name in ("s3.json", "server.json"):
            assert stat.S_IMODE((tmp_path / "server" / name).stat().st_mode) == 0o600
        assert server.secret_key not in repr(server)
        listening = subprocess.run(["ss", "-ltnp"], capture_output=True, text=True, check=False).stdout
        assert not [line for line in listening.splitlines() if "weed" in line and "127.0.0.1:" not in line]
    assert gone(server.supervisor)
    assert not list(Path("/tmp").glob(f"seaweedfs-*-{server.endpoint.rpartition(':')[2]}.sock"))
    with embedded_server(tmp_path) as again:
        assert (again.access_key, again.secret_key) == (server.access_key, server.secret_key)


def test_a_supervisor_killed_leaves_no_stale_address(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as server:
        os.kill(server.supervisor, signal.SIGKILL)
        assert gone(server.supervisor)
        assert json.loads((tmp_path / "server" / "server.json").read_text())["supervisor"] == server.supervisor
        with embedded_server(tmp_path) as again:
            assert again.supervisor != server.supervisor


def test_too_little_disk_is_said_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MIN_FREE_BYTES", 2**62)
    with pytest.raises(UserError, match=r"MiB of disk are free, .* needs"), embedded_server(tmp_path):
        pass
