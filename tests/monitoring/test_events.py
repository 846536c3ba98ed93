"""The event log under concurrency and damage, and the flow of progress through it."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from k2.monitoring import events
from k2.monitoring.events import (
    EventLog,
    JsonLines,
    RateWindow,
    StageProgress,
    TerminalLine,
    event_line,
    progress_for,
    read_events,
)


class Clock:
    """A monotonic clock that moves only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(events.time, "monotonic", lambda: self.now)


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def append(self, stage: str, kind: str, /, **values: Any) -> None:
        self.lines.append({"stage": stage, "kind": kind, **values})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    program = (
        "import sys; from pathlib import Path; from k2.monitoring.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for i in range(200): log.append(sys.argv[2], 'note', i=i, text='x' * 3000)"
    )
    command = [sys.executable, "-c", program, str(path)]
    children = [subprocess.Popen([*command, name]) for name in ("a", "b", "c")]
    assert [child.wait() for child in children] == [0, 0, 0]
    found, offset = read_events(path)
    assert offset == path.stat().st_size
    for name in ("a", "b", "c"):
        assert [event["i"] for event in found if event["stage"] == name] == list(range(200))


def test_reading_goes_on_from_the_offset_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == ([], 0)
    path.write_bytes(b'{"kind":"a"}\n{"kind":')
    first, offset = read_events(path)
    assert ([event["kind"] for event in first], offset) == (["a"], 13)
    with path.open("ab") as file:
        file.write(b'"b"}\n')
    second, offset = read_events(path, offset)
    assert ([event["kind"] for event in second], offset) == (["b"], path.stat().st_size)


def test_a_torn_line_in_the_middle_is_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind":"a"}\n{"ki\n{"kind":"c"}\n')
    assert [event["kind"] for event in read_events(path)[0]] == ["a", "c"]
    assert "torn line of 4 bytes" in caplog.text


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.floats(), st.integers(), st.none()), max_size=5))
def test_every_event_is_one_line_of_strict_json(values: dict[str, Any]) -> None:
    line = event_line("s", "k", {"payload": values})
    assert line.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse)["kind"] == "k"


def test_a_huge_event_keeps_its_short_values() -> None:
    event = json.loads(event_line("s", "stage_finished", {"status": "done", "metrics": ["x" * 100] * 1000}))
    assert event["status"] == "done"
    assert event["truncated"] > 100_000
    assert "metrics" not in event


def test_values_named_like_the_frame_do_not_replace_it(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e.jsonl")
    StageProgress("rl", log).event("note", stage="other", time=0, value=1)
    (event,) = read_events(log.path)[0]
    assert (event["stage"], event["kind"], event["value"]) == ("rl", "note", 1)


def test_a_full_disk_costs_events_and_not_the_stage(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(Path("/dev/full"))
    log.append("a", "x")
    log.append("a", "y")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text


def test_updates_are_limited_and_the_last_one_always_appears(clock: Clock) -> None:
    kept = Kept()
    progress = StageProgress("pretrain", kept, interval=1.0)
    for step in range(1, 101):
        clock.now += 0.125
        progress.update(step, 100, "steps", loss=1.0 / step)
    assert [line["done"] for line in kept.lines] == [*range(1, 98, 8), 100]
    assert kept.lines[5]["rate"] == pytest.approx(8.0)
    assert kept.lines[5]["eta_s"] == pytest.approx((100 - 41) / 8, abs=0.1)


def test_the_end_of_a_stage_shows_an_update_that_was_held_back(clock: Clock) -> None:
    kept = Kept()
    progress = StageProgress("ingest", kept)
    progress.update(1, 100, "documents")
    progress.update(7, 100, "documents")
    progress.event("stage_finished", status="done", cached=False, metrics={})
    assert [line["kind"] for line in kept.lines] == ["progress", "progress", "stage_finished"]
    assert kept.lines[1]["done"] == 7


def test_another_phase_starts_its_own_rate(clock: Clock) -> None:
    kept = Kept()
    progress = StageProgress("rl", kept, interval=0.0)
    for done in (1, 2):
        clock.now += 1
        progress.update(done, 10, "steps")
    clock.now += 1
    progress.update(500, 1000, "items")
    assert "rate" in kept.lines[1]
    assert "rate" not in kept.lines[2]


def test_a_flood_of_events_is_capped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENTS", 5)
    kept = Kept()
    progress = StageProgress("rephrase", kept)
    for _ in range(50):
        progress.event("rejected", reason="number")
    progress.event("other")
    progress.event("stage_finished", status="done", cached=False, metrics={})
    assert sum(line["kind"] == "rejected" for line in kept.lines) == 5
    assert kept.lines[-2] == {"stage": "rephrase", "kind": "events_dropped", "counts": {"rejected": 45}}


def test_the_rate_follows_a_change_of_pace_and_survives_going_back() -> None:
    window = RateWindow()
    assert window.add(0.0, 500) is None
    assert window.add(10.0, 600) == pytest.approx(10.0)
    for second in range(11, 60):
        rate = window.add(float(second), 600 + (second - 10))
    assert rate == pytest.approx(1.0)
    assert window.add(60.0, 3) is None


def test_where_progress_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("K2_EVENTS", raising=False)
    progress_for("sft").update(1, 2, "steps")
    assert json.loads(capfd.readouterr().err)["stage"] == "sft"
    monkeypatch.setenv("K2_EVENTS", str(tmp_path / "e.jsonl"))
    progress_for("sft").update(1, 2, "steps")
    assert capfd.readouterr().err == ""
    assert read_events(tmp_path / "e.jsonl")[0][0]["unit"] == "steps"


def test_a_terminal_shows_one_line_in_place(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, color_system=None)
    progress = StageProgress("sft", TerminalLine(console), interval=0.2)
    for step in (1, 2, 3):
        clock.now += 2.0
        progress.update(step, 4, "steps", loss=2.5)
    progress.event("stage_finished", status="done", cached=False, metrics={"loss_first": 3.0, "loss_last": 2.5})
    text = stream.getvalue()
    assert "3/4 steps  75% · 0.5 steps/s · 0:02 left" in text
    assert "sft done  loss 3 → 2.5" in text
    assert text.count("\n") == 1
    assert all(len(line.replace("\x1b[2K", "")) <= 60 for line in text.replace("\r", "\n").split("\n"))


def test_json_lines_are_flushed_as_they_come(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        JsonLines(stream).append("rl", "note", value=float("nan"))
        assert json.loads((tmp_path / "log").read_text())["value"] is None
    assert os.path.getsize(tmp_path / "log") > 0
