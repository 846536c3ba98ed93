"""Cron as Kubeflow's recurring runs understand it: five fields, and when they last fired."""

import re
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 6))
_NAMES = {
    "month": ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "weekday": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
_PART = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>[1-9]\d*))?")
_DAYS = 4 * 366
"""A 29th of February is in it."""


def valid_cron(text: str) -> str:
    """Five fields as in crontab(5), with single spaces. Raises ValueError naming the field."""
    fields = text.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(f"{text!r} has {len(fields)} fields; write minute hour day month weekday, as in '0 3 * * 0'")
    for field, (name, low, high) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            if not _fits(part, name, low, high):
                raise ValueError(f"{part!r} is no {name}; allowed are *, {low}-{high}, ranges, lists and /steps")
    return " ".join(fields)


def last_due(text: str, now: datetime) -> datetime | None:
    """The last moment up to `now`, in its zone, at which a cron fires; None when that is years ago."""
    fields = text.split()
    minutes, hours, days, months, weekdays = (
        {value for part in field.split(",") for value in _values(part, *bounds)}
        for field, bounds in zip(fields, _FIELDS, strict=True)
    )
    # A day must be right by both fields, or by one of them when neither is a star (robfig/cron, as in crontab).
    either = not fields[2].startswith("*") and not fields[4].startswith("*")

    def fires(day: date) -> bool:
        right = (day.day in days, day.isoweekday() % 7 in weekdays)
        return day.month in months and (any(right) if either else all(right))

    for day in (now.date() - timedelta(days=back) for back in range(_DAYS)):
        if fires(day):
            moments = (datetime.combine(day, time(hour, minute), now.tzinfo) for hour in hours for minute in minutes)
            past = [moment for moment in moments if moment <= now]
            if past:
                return max(past)
    return None


def _fits(part: str, name: str, low: int, high: int) -> bool:
    match = _PART.fullmatch(part.lower())
    if match is None:
        return False
    ends = [_number(end, name, low) for end in (match["first"], match["last"]) if end is not None]
    return all(low <= end <= high for end in ends) and ends == sorted(ends)


def _values(part: str, name: str, low: int, high: int) -> Iterator[int]:
    """What a part that fits stands for; `5/10` goes from 5 to the end."""
    match = _PART.fullmatch(part.lower())
    assert match is not None
    first = _number(match["first"], name, low) if match["first"] else low
    last = _number(match["last"], name, low) if match["last"] else first
    open_ended = match["first"] is None or (match["step"] and not match["last"])
    return iter(range(first, (high if open_ended else last) + 1, int(match["step"] or 1)))


def _number(text: str, name: str, low: int) -> int:
    names = _NAMES.get(name, ())
    if text in names:
        return names.index(text) + low
    return int(text) if text.isascii() and text.isdigit() else -1
