"""What the pipeline itself costs: the nano preset from nothing, and again with every stage made before.

Prints JSON rows. The step overhead is the run with every stage cached, server start and kfp's import included,
divided by its steps. The one ratio that is independent of the machine's speed, cached over first run, has no target.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _table import Row, row, run

STEPS = 15
"""Stages and the step that resolves the configuration."""


def seconds(home: Path) -> float:
    """Wall-clock seconds of one `k2 run --preset nano` on the store under `home`."""
    started = time.monotonic()
    command = [sys.executable, "-m", "k2.cli", "run", "--preset", "nano", "--runs", str(home / "runs")]
    subprocess.run(command, env=os.environ | {"K2_HOME": str(home)}, check=True, capture_output=True)
    return time.monotonic() - started


def rows(rounds: int) -> Iterator[Row]:
    """All rows; every round starts from nothing."""
    first, again = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="k2-bench-") as folder:
            first.append(seconds(Path(folder)))
            again.append(seconds(Path(folder)))
    yield row("nano from nothing, seconds", "60 s", first, 60, "lower")
    yield row("nano with every stage cached, seconds", "15 s", again, 15, "lower")
    yield row("the cached run by step, seconds", "0.5 s", [each / STEPS for each in again], 0.5, "lower")
    yield row("cached run", "first run", [b / a for a, b in zip(first, again, strict=True)], None, "lower")


if __name__ == "__main__":
    run(__doc__, rows, 3)
