"""Numbers as people read them, the same in the terminal and in the report."""

import math
from collections.abc import Mapping
from typing import Any


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """`0:07`, `12:05`, `1:02:03`: fixed in form, for columns that change every second."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: float) -> str:
    """About four significant digits: `1,234,567`, `12.35`, `0.0123`, `3.1e-05`."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def short(value: float) -> str:
    """A number in at most six characters: `950`, `12.3k`, `4.56M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in binary units: `512 B`, `1.5 KiB`, `12.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def value_text(value: Any) -> str:
    """Any JSON value in one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {value_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(item) for item in value)
    return str(value)


_ARROWS = (
    ("accuracy_before", "accuracy_after", "accuracy"),
    ("accuracy_bf16", "accuracy_int4", "accuracy"),
    ("reward_first", "reward_last", "reward"),
    ("loss_first", "loss_last", "loss"),
)
_SINGLE = ("reward", "accuracy", "loss", "accepted", "documents", "tokens", "promoted")


def key_metric(values: Mapping[str, Any]) -> str:
    """The one thing worth a column: `loss 6.21 → 3.04`, `accepted 41`, or the name of the present step."""
    for first, last, name in _ARROWS:
        if isinstance(values.get(first), (int, float)) and isinstance(values.get(last), (int, float)):
            return f"{name} {values[first]:.3g} → {values[last]:.3g}"
    for name in _SINGLE:
        if isinstance(values.get(name), bool):
            return f"{name} {value_text(values[name])}"
        if isinstance(values.get(name), (int, float)):
            return f"{name} {short(values[name])}"
    return values["step"] if isinstance(values.get("step"), str) else ""
