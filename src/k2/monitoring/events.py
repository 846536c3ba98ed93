"""Where stages say how far they are: an append-only file of JSON lines, a terminal line, or lines on stderr."""

import json
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from k2.masking import masked
from k2.monitoring.format import clock, key_metric, short
from k2.monitoring.metrics import StageMetrics, serve_from_environment
from k2.processes import rank

log = logging.getLogger(__name__)

RATE_WINDOW_S = 30.0
"""Rates are means over this many seconds: steady to look at, and still following a change of pace."""

MAX_EVENTS = 1000
"""Events of one kind that one stage may write; the rest are counted."""


MAX_LINE = 64 * 1024
"""Characters of one event."""

STATUS_COLOURS = {"done": "green", "cached": "cyan", "failed": "red", "running": "yellow"}


class Sink(Protocol):
    """Takes one event of a stage."""

    def append(self, stage: str, kind: str, /, **values: Any) -> None:
        """Record it."""


def event_line(stage: str, kind: str, values: Mapping[str, Any]) -> str:
    """One JSON line: time (UTC), stage, kind, values. Numbers that are not finite are null.

    Of an event longer than `MAX_LINE` only the short values are kept, and `truncated` is its length.
    """
    frame = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "stage": stage, "kind": kind}
    line = _strict_json({**values, **frame})
    if len(line) > MAX_LINE:
        kept = {name: value for name, value in values.items() if len(str(value)) <= 1000}
        line = _strict_json({**kept, **frame, "truncated": len(line)})
    return masked(line) + "\n"


def _strict_json(event: Mapping[str, Any]) -> str:
    finite = json.loads(json.dumps(event, default=float), parse_constant=lambda _: None)
    return json.dumps(finite, sort_keys=True, separators=(",", ":"))


class EventLog:
    """A file of JSON lines to which several processes append, each line in one write."""

    def __init__(self, path: Path) -> None:
        self.path, self._broken = path, False

    def append(self, stage: str, kind: str, /, **values: Any) -> None:
        """Add one line. A disk that is full costs events, never the stage: the first failure is logged."""
        line = event_line(stage, kind, values).encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._broken:
                log.warning("%s: events are lost: %s", self.path, error.strerror)
            self._broken = True


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events from a byte offset on, and the offset of the next read.

    A last line without its newline is left for the next read; a line that is no JSON (torn by a full disk) is
    skipped, and logged.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return [event for line in whole.splitlines() if (event := _parse(line, path))], offset + len(whole)


def _parse(line: bytes, path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        log.warning("%s: a torn line of %d bytes is skipped", path, len(line))
        return None
    return value if isinstance(value, dict) else None


class RateWindow:
    """Units per second over the last `RATE_WINDOW_S`."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def add(self, now: float, done: float) -> float | None:
        """The rate up to now; None until there are two points. Going backwards starts afresh."""
        if self._points and done < self._points[-1][1]:
            self._points.clear()
        self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[0][0] > RATE_WINDOW_S:
            self._points.popleft()
        start, first = self._points[0]
        return (done - first) / (now - start) if now > start and done > first else None


class StageProgress:
    """The `Progress` of one stage: limits the flow to `sink`, and computes rate and time left."""

    def __init__(self, stage: str, sink: Sink, *, run: str = "", interval: float = 1.0) -> None:
        self._stage, self._sink, self._interval = stage, sink, interval
        self._metrics = StageMetrics(stage, run)
        self._started = time.monotonic()
        self._next = 0.0
        self._phase: tuple[float, str] | None = None
        self._rate, self._token_rate = RateWindow(), RateWindow()
        self._events: Counter[str] = Counter()
        self._held: dict[str, Any] | None = None

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        """One line per interval, and always the last. Another total or unit is another phase of the stage."""
        now = time.monotonic()
        if (total, unit) != self._phase:
            self._phase, self._rate, self._next = (total, unit), RateWindow(), 0.0
        if now < self._next and done < total:
            self._held = {"done": done, "total": total, "unit": unit, **values}
            return
        self._next, self._held = now + self._interval, None
        rate = self._rate.add(now, done)
        line = {"done": done, "total": total, "unit": unit, **values}
        if rate:
            line |= {"rate": round(rate, 4), "eta_s": round((total - done) / rate, 1)}
        self._sink.append(self._stage, "progress", **line)
        tokens = self._token_rate.add(now, values["tokens"]) if "tokens" in values else None
        self._metrics.progress(done, total, now - self._started, tokens, values)

    def event(self, kind: str, **values: Any) -> None:
        """Pass an event on, the first `MAX_EVENTS` of its kind; the end of the stage tells how many were not."""
        self._events[kind] += 1
        self._metrics.event(kind, values)
        if kind == "stage_finished":
            self._flush()
        if self._events[kind] <= MAX_EVENTS:
            self._sink.append(self._stage, kind, **values)

    def _flush(self) -> None:
        if self._held:
            self._sink.append(self._stage, "progress", **self._held)
            self._held = None
        dropped = {kind: count - MAX_EVENTS for kind, count in sorted(self._events.items()) if count > MAX_EVENTS}
        if dropped:
            self._sink.append(self._stage, "events_dropped", counts=dropped)


class JsonLines:
    """Events as JSON lines on a stream, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def append(self, stage: str, kind: str, /, **values: Any) -> None:
        """Write one line."""
        self._stream.write(event_line(stage, kind, values))
        self._stream.flush()


class TerminalLine:
    """One line that is rewritten in place, for a stage run alone on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def append(self, stage: str, kind: str, /, **values: Any) -> None:
        """Show progress in place; leave a line for the end of the stage."""
        if kind == "progress":
            text, finished = progress_text(values), values["done"] >= values["total"]
            self._show(Text.assemble((f"{stage} ", "bold"), text), end="\n" if finished else "\r")
        elif kind == "stage_finished":
            word = "cached" if values.get("cached") else values["status"]
            colour, detail = STATUS_COLOURS[word], key_metric(values.get("metrics") or {})
            self._show(Text.assemble((f"{stage} ", "bold"), (word, colour), f"  {detail}"), end="\n")

    def _show(self, text: Text, end: str) -> None:
        self._console.control(Control((ControlType.ERASE_IN_LINE, 2)))
        self._console.print(text, end=end, no_wrap=True, overflow="ellipsis", crop=True)


def progress_text(values: Mapping[str, Any]) -> str:
    """`120/500 steps  24% · 3.1 steps/s · 2:03 left · loss 3.21`."""
    done, total, unit = values["done"], values["total"], values["unit"]
    share = f"  {done / total:.0%}" if total else ""
    parts = [f"{short(done)}/{short(total)} {unit}{share}"]
    if values.get("rate"):
        parts += [f"{short(values['rate'])} {unit}/s", f"{clock(values['eta_s'])} left"]
    return " · ".join([*parts, *filter(None, [key_metric(values)])])


class Nowhere:
    """Keeps no events: of several ranks only the first one speaks."""

    def append(self, stage: str, kind: str, /, **values: Any) -> None:
        """Forget it."""


def progress_for(stage: str, run: str = "") -> StageProgress:
    """The progress this process should use: the file in `K2_EVENTS`, else a terminal, else a line per 10 s.

    `run`, or else `K2_RUN`, names the run in metrics; `K2_METRICS_PORT` serves them. Ranks but the first say nothing.
    """
    if rank() > 0:
        return StageProgress(stage, Nowhere())
    serve_from_environment()
    run, path = run or os.environ.get("K2_RUN", ""), os.environ.get("K2_EVENTS")
    if path:
        return StageProgress(stage, EventLog(Path(path)), run=run)
    if sys.stderr.isatty():
        return StageProgress(stage, TerminalLine(Console(stderr=True)), run=run, interval=0.2)
    return StageProgress(stage, JsonLines(sys.stderr), run=run, interval=10.0)
