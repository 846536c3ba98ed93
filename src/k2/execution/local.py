"""`k2 run`: the whole DAG on this machine, by kfp's local subprocess runner in a child process.

The parent shows progress, and cleans up whatever way the run ends. The child runs kfp; each step is a process of its
own. Steps leave their state in the run's record in the object store, which the parent reads at the end.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from k2.config.k2 import K2Config
from k2.config.report import ReportConfig
from k2.errors import StageError
from k2.execution.component import recorded
from k2.execution.registry import STAGES
from k2.execution.temporary import temporary_folder
from k2.execution.warm import warm_starts
from k2.monitoring.events import EventLog
from k2.monitoring.run_record import read_run, summary
from k2.monitoring.terminal import watch
from k2.processes import ROOT_VARIABLE
from k2.store.client import Store
from k2.store.embedded import embedded_server

FULL_BYTES = 16 * 2**20
"""With less than this free the embedded store refuses to write, without saying why."""

RECIPE = "k2"
"""The pipeline `pipelines/k2.py`."""

STOP_S = 10.0
"""Seconds a stopped run has before it is killed. Nothing depends on them: published steps are safe."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its summary and the code its process exits with."""

    summary: Mapping[str, Any]
    folder: Path
    exit_code: int


def k2_home() -> Path:
    """Where this machine keeps the embedded store, caches and locks: `$K2_HOME`, by default `.k2`."""
    return Path(os.environ.get("K2_HOME", ".k2")).absolute()


@contextmanager
def object_store() -> Iterator[Store]:
    """The configured object store, or the embedded one when none is configured.

    Raises:
        UserError: it cannot be used.
        StageError: the disk of the embedded one is full.
    """
    configured = bool(os.environ.get("K2_S3_ENDPOINT"))
    server: AbstractContextManager[Any] = nullcontext() if configured else embedded_server(k2_home())
    with server as embedded:
        if embedded is not None:
            os.environ.update(embedded.environment())
        try:
            store = Store.from_environment()
            store.check()
            yield store
        except StageError as error:
            if embedded is not None and shutil.disk_usage(k2_home()).free < FULL_BYTES:
                raise StageError(f"no space left on disk for {k2_home()}; free some and run again") from error
            raise
        finally:
            if embedded is not None:
                for name in embedded.environment():
                    os.environ.pop(name, None)


def run_pipeline(
    config: K2Config, overrides: Mapping[str, Any], runs: Path, stream: TextIO, pipeline: str = RECIPE
) -> RunResult:
    """Run a DAG and leave `summary.json`, `events.jsonl`, `report.html` and `kfp.log` in `runs/<run>/`.

    Raises:
        UserError: the object store cannot be used.
    """
    study = "" if pipeline == RECIPE else f"{pipeline.rpartition('/')[2]}-"
    run = f"{study}{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = runs.absolute() / run
    folder.mkdir(parents=True)
    os.environ["K2_EVENTS"] = str(folder / "events.jsonl")
    EventLog(folder / "events.jsonl").append("run", "run_started", run=run, preset=config.preset)
    started = time.monotonic()
    with _kfp_child(pipeline, folder) as (child, python), object_store() as store:
        request = {
            "parameters": {"preset": config.preset, "overrides": json.dumps(overrides), "run": run},
            "environment": {name: value for name, value in os.environ.items() if name.startswith("K2_S3_")},
            "python": python,
        }
        status = _run_child(child, request, [] if study else list(STAGES), folder, stream)
        if status == "interrupted" or not _reported(store, run):
            recorded("report", ReportConfig(run=run, preset=config.preset, status=status), {}, run)
        return _finish(store, config.preset, run, status, time.monotonic() - started, folder)


@contextmanager
def _kfp_child(pipeline: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A child that imports kfp and waits for a request, and the program that starts its steps; stopped at the end.

    What kfp and steps leave in the folder of temporary files goes with them: kfp a program per step, a step that is
    killed all that it worked on.
    """
    with ExitStack() as stack:
        environment = _child_environment(folder) | {"TMPDIR": stack.enter_context(temporary_folder(k2_home()))}
        log = stack.enter_context((folder / "kfp.log").open("wb"))
        python = stack.enter_context(warm_starts(environment, log))
        child = subprocess.Popen(
            [sys.executable, "-m", "k2.execution.kfp_local", pipeline, str(k2_home() / "kfp" / folder.name)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            yield child, python
        finally:
            _stop(child)


def _run_child(
    child: subprocess.Popen[bytes], request: Mapping[str, Any], stages: Sequence[str], folder: Path, stream: TextIO
) -> str:
    """Have kfp run the pipeline and watch it; returns done, failed or interrupted."""
    assert child.stdin is not None
    try:
        with _interrupt_on_sigterm():
            child.stdin.write(json.dumps(request).encode())
            child.stdin.close()
            watch(folder / "events.jsonl", stages, lambda: child.poll() is not None, stream)
    except KeyboardInterrupt:
        _stop(child)
        return "interrupted"
    return "done" if child.wait() == 0 else "failed"


def _child_environment(folder: Path) -> dict[str, str]:
    source = Path(__file__).parents[2]
    paths = [str(source), str(source.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "K2_RUN": folder.name,
        "K2_HOME": str(k2_home()),
        ROOT_VARIABLE: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that spin at barriers bring a busy machine to a halt.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
    }


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C while a child runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _reported(store: Store, run: str) -> bool:
    """Whether the exit handler has made the last report; before, there is the one of the stage that ended last."""
    return any((record["stage"], record["status"]) == ("report", "done") for record in read_run(store, run))


def _finish(store: Store, preset: str, run: str, status: str, wall_s: float, folder: Path) -> RunResult:
    records = read_run(store, run)
    result = summary(run, preset, status, round(wall_s, 3), records)
    body = json.dumps(result, indent=1).encode()
    (folder / "summary.json").write_bytes(body)
    store.put(f"runs/{run}/summary.json", body)
    store.download(f"runs/{run}/report.html", folder / "report.html")
    failed = [record["error"] for record in records if record["status"] == "failed"]
    codes = {"done": 0, "interrupted": 130}
    return RunResult(result, folder, codes.get(status, failed[0]["exit_code"] if failed else 1))
