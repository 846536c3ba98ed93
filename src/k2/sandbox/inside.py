"""The first process of a sandbox's pod: copies the files, runs the program, and bounds its time, output and processes.

    python -m k2.sandbox.inside SECONDS PROCESSES OUTPUT_BYTES COMMAND...

The program has the same user, so it may not look into or stop this process: the kernel keeps signals from a pod's first
process and, as that is not dumpable, debuggers too. The pod's own deadline and limits hold in any case.
"""

import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

from k2.sandbox.contract import Exceeded

GIVEN = Path("/k2-files")
"""Where the files are mounted, read-only."""

VERDICT = Path("/dev/termination-log")
"""Kubernetes reports what is in it as the message with which the container ended."""

PR_SET_DUMPABLE = 4
TICK_S = 0.1


def supervise(command: Sequence[str], seconds: float, output_bytes: int, target: BinaryIO) -> tuple[int, Exceeded]:
    """Exit code of a command and the limit that ended it; its output goes to `target` as it comes."""
    deadline, left = time.monotonic() + seconds, output_bytes
    environment = {"PATH": os.environ["PATH"], "HOME": os.getcwd(), "LANG": "C.UTF-8"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    exceeded: Exceeded = ""
    while not exceeded:
        chunk = _read(process.stdout)
        target.write(chunk[:left])
        target.flush()
        left -= len(chunk)
        if left < 0:
            exceeded = "output"
        elif not chunk and process.poll() is not None:
            break
        elif time.monotonic() > deadline:
            exceeded = "time"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    code = process.wait()
    return (code if code >= 0 else 128 - code), exceeded


def _read(stream: IO[bytes]) -> bytes:
    """What was written meanwhile; nothing after a moment, also when the writer closed its end."""
    ready, _, _ = select.select([stream], [], [], TICK_S)
    chunk = os.read(stream.fileno(), 65536) if ready else b""
    if ready and not chunk:
        time.sleep(TICK_S)
    return chunk


def main(arguments: Sequence[str]) -> int:
    """Run the command line's program in the current folder."""
    seconds, processes, output_bytes, *command = arguments
    # The mount's own links, which point at the version of the files, have names that begin with dots.
    for path in sorted(path for path in GIVEN.iterdir() if not path.name.startswith("..")):
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, Path(path.name))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    bound = int(processes) if most == resource.RLIM_INFINITY else min(int(processes), most)
    resource.setrlimit(resource.RLIMIT_NPROC, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code, exceeded = supervise(command, float(seconds), int(output_bytes), sys.stdout.buffer)
    VERDICT.write_text(exceeded)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
