"""What `k2 run` shows: one row per stage, alive on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from k2.monitoring.events import STATUS_COLOURS, event_line, read_events
from k2.monitoring.format import clock, duration, key_metric, short

REFRESH_S = 0.25
LINE_INTERVAL_S = 10.0
"""Seconds between the JSON lines that tell a log how far the running stage is."""

WIDE = 96
MEDIUM = 64
"""Columns of the terminal from which rate and time left, and the key metric, have room."""

GLYPHS = {"waiting": "·", "running": "▸", "done": "✓", "cached": "≡", "failed": "✗"}


@dataclass
class Row:
    """What is known of one stage."""

    status: str = "waiting"
    started: float = 0.0
    wall_s: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def seconds(self, now: float) -> float:
        """Wall time up to now, or in all."""
        return now - self.started if self.status == "running" else self.wall_s


class Board:
    """The state of all stages, made from events."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.rows = {stage: Row() for stage in stages}

    def take(self, event: Mapping[str, Any]) -> None:
        """Apply one event; what concerns no stage of this run changes nothing."""
        if event["kind"] == "planned":
            self.rows |= {stage: Row() for stage in event["stages"]}
        row = self.rows.get(event["stage"])
        if row is None:
            return
        values = {name: value for name, value in event.items() if name not in ("time", "stage", "kind")}
        when = datetime.fromisoformat(event["time"]).timestamp()
        if event["kind"] == "stage_started":
            self.rows[event["stage"]] = Row("running", when)
        elif event["kind"] == "progress":
            row.progress, row.values, row.note = values, row.values | values, ""
        elif event["kind"] == "stage_finished":
            row.status = "cached" if values.get("cached") else values["status"]
            row.wall_s = max(0.0, when - row.started)
            row.values, row.note = values.get("metrics") or {}, values.get("error") or ""
        elif event["kind"] == "waiting":
            row.note = f"waiting for {values['holder']}"

    def running(self) -> list[str]:
        """Stages at work now."""
        return [stage for stage, row in self.rows.items() if row.status == "running"]


def watch(events: Path, stages: Sequence[str], stop: Callable[[], bool], stream: TextIO) -> None:
    """Show a run until `stop()` is true and all its events are shown.

    On a terminal a table that is redrawn in place; elsewhere a line when a stage starts and ends, and a JSON line per
    `LINE_INTERVAL_S` for what runs.
    """
    console = Console(file=stream, highlight=False)
    board, started = Board(stages), time.time()
    if not console.is_terminal:
        _watch_lines(events, board, stop, stream)
        return
    with Live(console=console, auto_refresh=False, transient=False, vertical_overflow="crop") as live:
        offset, stopping = 0, False
        while not stopping:
            stopping = stop()
            found, offset = read_events(events, offset)
            for event in found:
                board.take(event)
            live.update(render(board, time.time() - started, console.width, time.time()), refresh=True)
            if not stopping:
                time.sleep(REFRESH_S)


def _watch_lines(events: Path, board: Board, stop: Callable[[], bool], stream: TextIO) -> None:
    offset, stopping, due = 0, False, time.monotonic() + LINE_INTERVAL_S
    while not stopping:
        stopping = stop()
        found, offset = read_events(events, offset)
        for event in found:
            board.take(event)
            stream.write(_plain(event, board))
        if time.monotonic() >= due:
            due += LINE_INTERVAL_S
            stream.writelines(event_line(s, "progress", board.rows[s].progress) for s in board.running())
        stream.flush()
        if not stopping:
            time.sleep(REFRESH_S)


def _plain(event: Mapping[str, Any], board: Board) -> str:
    """The line for the start or end of a stage; nothing for other events."""
    stage, row = event["stage"], board.rows.get(event["stage"])
    if row is None or event["kind"] not in ("stage_started", "stage_finished"):
        return ""
    if event["kind"] == "stage_started":
        return f"{stage}: started\n"
    detail = row.note or key_metric(row.values)
    return f"{stage}: {row.status} in {duration(row.wall_s)}{', ' if detail else ''}{detail}\n"


def render(board: Board, elapsed: float, width: int, now: float) -> Group:
    """The table and its footer for a terminal of `width` columns."""
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False, expand=False)
    table.add_column(width=1)
    table.add_column(width=max(map(len, board.rows), default=10), no_wrap=True)
    table.add_column(width=20 if width >= WIDE else 10, no_wrap=True)
    table.add_column(width=4, justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column(width=22, no_wrap=True, overflow="ellipsis")
    if width >= MEDIUM:
        table.add_column(width=min(34, width - (79 if width >= WIDE else 43)), no_wrap=True, overflow="ellipsis")
    table.add_column(width=7, justify="right", no_wrap=True)
    for stage, row in board.rows.items():
        table.add_row(*_cells(stage, row, width, now))
    return Group(table, _footer(board, elapsed))


def _cells(stage: str, row: Row, width: int, now: float) -> list[Text | ProgressBar]:
    colour = STATUS_COLOURS.get(row.status, "bright_black")
    name_style = "bold" if row.status == "running" else ("dim" if row.status == "waiting" else "")
    share = _share(row)
    cells: list[Text | ProgressBar] = [Text(GLYPHS[row.status], colour), Text(stage, name_style)]
    cells += [_bar(row, share), Text("" if share is None else f"{share:.0%}", "dim")]
    if width >= WIDE:
        cells.append(Text(_pace(row), "dim"))
    if width >= MEDIUM:
        cells.append(Text("" if row.status == "failed" else row.note or key_metric(row.values)))
    spent = row.seconds(now)
    cells.append(Text("" if row.status == "waiting" else (f"{spent:.1f}s" if spent < 10 else clock(spent)), "dim"))
    return cells


def _share(row: Row) -> float | None:
    """Share of the current phase that is done; None where there is no bar."""
    if row.status in ("waiting", "cached", "done"):
        return None
    return min(1.0, row.progress["done"] / row.progress["total"]) if row.progress.get("total") else None


def _bar(row: Row, share: float | None) -> Text | ProgressBar:
    if row.status in ("waiting", "cached"):
        return Text("cached" if row.status == "cached" else "", "dim")
    colour = STATUS_COLOURS[row.status]
    done = 1.0 if row.status == "done" else share or 0.0
    return ProgressBar(1.0, done, complete_style=colour, finished_style=colour)


def _pace(row: Row) -> str:
    if row.status != "running" or not row.progress.get("rate"):
        return ""
    unit = row.progress["unit"]
    return f"{short(row.progress['rate'])} {unit}/s {clock(row.progress['eta_s'])} left"


def _footer(board: Board, elapsed: float) -> Text:
    states = [row.status for row in board.rows.values()]
    finished = sum(state in ("done", "cached") for state in states)
    text = f"  {finished} of {len(states)} stages · {clock(elapsed)}"
    failed = [(stage, row.note) for stage, row in board.rows.items() if row.status == "failed"]
    return Text.assemble((text, "bold"), *((f"\n✗ {stage}: {note}", "red") for stage, note in failed))
