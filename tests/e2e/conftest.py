"""One finished `nano` run that the end-to-end tests share."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CLEARED = ("K2_S3_ENDPOINT", "K2_S3_ACCESS_KEY", "K2_S3_SECRET_KEY", "K2_S3_BUCKET", "K2_S3_PREFIX")


@dataclass(frozen=True)
class Finished:
    """A `k2` command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed with `--json`."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Site:
    """A folder in which `k2` is used as a user would: its own embedded store, its own runs."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """A user's environment, without what other tests set."""
        kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
        return kept | {"K2_HOME": str(self.folder / ".k2"), "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start `k2` and return at once."""
        return subprocess.Popen(
            [sys.executable, "-m", "k2.cli", *arguments],
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A test run in the background ignores Ctrl-C, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def k2(self, *arguments: str, **variables: str) -> Finished:
        """Run `k2` to its end."""
        process = self.start(*arguments, **variables)
        out, err = process.communicate()
        return Finished(process.returncode, out, err)

    def digest(self, uri: str) -> str:
        """Content digest of an artifact."""
        return str(self.k2("lineage", uri, "--json").json["digest"])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty folder."""
    return Site(tmp_path)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A `TMPDIR` that nothing else uses, of a short name: a socket's path has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="k2-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, Finished]:
    """A site on which `k2 run --preset nano --json` was run once."""
    site = Site(tmp_path_factory.mktemp("nano"))
    return site, site.k2("run", "--preset", "nano", "--json")
