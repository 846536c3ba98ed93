"""The live table at several widths, and what logs get instead."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from k2.execution.registry import STAGES
from k2.monitoring import terminal
from k2.monitoring.events import EventLog
from k2.monitoring.terminal import Board, render, watch

ERROR = "the endpoint http://localhost:9 is unreachable; check K2_S3_ENDPOINT"


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("run", "run_started", run="r", preset="tiny")
    log.append("corpus", "stage_started")
    log.append("corpus", "stage_finished", status="done", cached=True, metrics={"documents": 2121})
    log.append("pretrain", "stage_started")
    log.append("pretrain", "progress", done=30, total=120, unit="steps", rate=2.5, eta_s=36.0, loss=6.5)
    log.append("pretrain", "qk_clip", heads=2)
    return log


def shown(board: Board, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(render(board, 75.0, width, 0.0))
    return capture.get().splitlines()


def board_of(log: EventLog) -> Board:
    board = Board(list(STAGES))
    for event in terminal.read_events(log.path)[0]:
        board.take(event)
    return board


@pytest.mark.parametrize("width", [200, 120, 96, 80, 64, 50, 40])
def test_every_stage_keeps_its_one_line_at_any_width(log: EventLog, width: int) -> None:
    lines = shown(board_of(log), width)
    assert len(lines) == len(STAGES) + 1
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if "pretrain" in line)
    assert row.startswith("▸  pretrain")
    assert "25%" in row
    assert ("2.5 steps/s 0:36 left" in row) == (width >= 96)
    assert ("loss 6.5" in row) == (width >= 64)
    assert lines[-1].strip() == f"1 of {len(STAGES)} stages · 1:15"


def test_a_failure_is_told_in_full_below_the_table(log: EventLog) -> None:
    log.append("pretrain", "stage_finished", status="failed", error=ERROR)
    lines = shown(board_of(log), 70)
    assert next(line for line in lines if "pretrain" in line).startswith("✗")
    assert " ".join(line.strip() for line in lines[-2:]) == f"✗ pretrain: {ERROR}"


def test_a_stage_that_starts_again_forgets_its_failure(log: EventLog) -> None:
    log.append("pretrain", "stage_finished", status="failed", error=ERROR)
    log.append("pretrain", "stage_started")
    assert board_of(log).rows["pretrain"].status == "running"
    assert ERROR not in "\n".join(shown(board_of(log), 120))


def test_logs_get_plain_lines_and_a_json_line_per_interval(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_INTERVAL_S", 0.0)
    stream = io.StringIO()
    watch(log.path, list(STAGES), lambda: True, stream)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["corpus: started", "corpus: cached in 0.0 s, documents 2.12k", "pretrain: started"]
    assert {"stage": "pretrain", "kind": "progress", "done": 30, "loss": 6.5}.items() <= json.loads(lines[3]).items()


def test_on_a_terminal_the_last_state_stays(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "REFRESH_S", 0.0)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    calls: list[Any] = []

    def stop() -> bool:
        calls.append(None)
        if len(calls) == 3:
            log.append("pretrain", "stage_finished", status="done", cached=False, metrics={"loss_last": 3, "loss": 3})
        return len(calls) >= 4

    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    watch(log.path, list(STAGES), stop, stream)
    assert "2 of 14 stages" in stream.getvalue().rsplit("\x1b[1A", 1)[-1].replace("\x1b[1m", "")
