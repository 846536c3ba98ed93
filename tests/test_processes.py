"""What a local run starts ends with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2.processes import ROOT_VARIABLE

FORKING = """
import multiprocessing
from k2.processes import end_with_run
end_with_run()
manager = multiprocessing.get_context("fork").Manager()
print(manager._process.pid, flush=True)
manager.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose kernel ends processes with their parents")
def test_a_forked_process_that_waits_for_its_killed_parent_ends_too() -> None:
    environment = os.environ | {ROOT_VARIABLE: str(os.getpid())}
    with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True, env=environment) as step:
        assert step.stdout is not None
        forked = Path("/proc", step.stdout.readline().strip())
        time.sleep(0.5)
        assert forked.exists()
        step.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while forked.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not forked.exists()
