"""Warm starts for the steps of a local run.

kfp's local runner starts an interpreter for each step, and each would spend up to seconds on importing torch and its
like. One process per run imports them once, in the time in which it has nothing else to do, and forks a step on
request: kfp is given a launcher in place of the interpreter, which hands its arguments, environment, working directory
and standard streams over and waits for the exit code. A step is a process of its own in either case.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from k2.execution.registry import STAGES
from k2.processes import end_with_run

SETTLED_S = 1.5
"""A step that runs this long will run for a while, so that importing for the next one delays nobody."""
LAUNCHER = """#!/bin/sh
exec {python} -S -E {client} {socket} "$@"
"""


@contextmanager
def warm_starts(environment: Mapping[str, str], log: IO[bytes]) -> Iterator[str]:
    """Keep a warm server meanwhile; yields the program to start steps with, on other systems than Linux plain Python.

    Args:
        environment: of the server; a step has the environment that the launcher was started in.
        log: takes what the server says.
    """
    if sys.platform != "linux":
        yield sys.executable
        return
    temporary = tempfile.TemporaryDirectory(prefix="k2-warm-", dir=environment.get("TMPDIR"))
    with temporary as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        command = [sys.executable, "-m", "k2.execution.warm", str(listener.fileno())]
        server = subprocess.Popen(
            command, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            yield str(_write_launcher(Path(folder)))
        finally:
            server.kill()
            server.wait()


def _write_launcher(folder: Path) -> Path:
    launcher = folder / "python"
    client = Path(__file__).with_name("warm_client.py")
    words = {"python": sys.executable, "client": str(client), "socket": str(folder / "socket")}
    launcher.write_text(LAUNCHER.format(**{name: shlex.quote(word) for name, word in words.items()}))
    launcher.chmod(0o700)
    return launcher


class WarmServer:
    """Forks steps on request, and imports what later steps need while one runs."""

    def __init__(self, listener: socket.socket) -> None:
        self.selector = selectors.DefaultSelector()
        self.running: dict[int, socket.socket] = {}
        self.cold = list(STAGES)
        self.selector.register(listener, selectors.EVENT_READ, self._accept)

    def serve(self) -> list[str]:
        """Serve until killed. Returns in a forked step only: the arguments that it has to run."""
        while True:
            idle = self.cold and self.running
            ready = self.selector.select(SETTLED_S if idle else None)
            if not ready:
                self._warm(self.cold.pop(0))
            for key, _ in ready:
                arguments = key.data(key.fileobj)
                if arguments is not None:
                    return list(arguments)

    def _warm(self, stage: str) -> None:
        try:
            importlib.import_module(STAGES[stage].module)
        except ImportError as error:
            print(f"not imported beforehand: {error}; the step will say more", flush=True)

    def _accept(self, listener: socket.socket) -> list[str] | None:
        connection, _ = listener.accept()
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as stream:
            request = json.load(stream)
        self.cold = [stage for stage in self.cold if stage not in request["arguments"]]
        gc.freeze()
        child = os.fork()
        if child == 0:
            return _become(request, streams)
        for descriptor in streams:
            os.close(descriptor)
        self.running[child] = connection
        self.selector.register(os.pidfd_open(child), selectors.EVENT_READ, self._reap)
        return None

    def _reap(self, pidfd: int) -> None:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        assert result is not None
        self.selector.unregister(pidfd)
        os.close(pidfd)
        code = result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status
        with self.running.pop(result.si_pid) as connection:
            connection.sendall(bytes([code]))


def _become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Turn the fresh fork into the process that the launcher was meant to be; returns its arguments."""
    for standard, descriptor in enumerate(streams):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.chdir(request["directory"])
    sys.path[0] = request["directory"]
    os.environ.clear()
    os.environ.update(request["environment"])
    return list(request["arguments"])


def main(listener: int) -> None:
    """Serve on the inherited listening socket; in a forked step, run `-m <module> <arguments>` as Python would."""
    end_with_run()
    os.environ["_KFP_RUNTIME"] = "true"
    for module in ("kfp.dsl.executor_main", "k2.execution.component"):
        importlib.import_module(module)
    _, module, *arguments = WarmServer(socket.socket(fileno=listener)).serve()
    sys.argv = [module, *arguments]
    code = _run(module)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking apart all that was imported would keep the next step waiting for half a second.
    os._exit(code)


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
