"""What a report is made of: sections of blocks, and the way to read what a stage left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from k2.monitoring.format import value_text

EXAMPLE_CHARACTERS = 1600
"""Longest text of an example; the rest is an ellipsis."""


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    svg: Markup
    caption: str
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Table:
    """Rows of text; all columns but the first are aligned as numbers unless `text` is set."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    text: bool = False
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Facts:
    """Names and values that need no columns of their own."""

    rows: Sequence[tuple[str, str]]
    caption: str
    kind: str = field(default="facts", init=False)


@dataclass(frozen=True)
class Prose:
    """One paragraph."""

    text: str
    kind: str = field(default="prose", init=False)


@dataclass(frozen=True)
class Missing:
    """Something this run did not record."""

    what: str
    why: str = "not recorded"
    kind: str = field(default="missing", init=False)


@dataclass(frozen=True)
class Pair:
    """Two texts side by side, with a verdict above."""

    verdict: str
    good: bool
    meta: str
    left: str
    right: str
    kind: str = field(default="pair", init=False)


@dataclass(frozen=True)
class Turn:
    """One message of a dialog: who, what, and the calls as (tool, arguments)."""

    role: str
    text: str
    calls: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Chat:
    """A dialog to read, and the names of the tools that were offered."""

    caption: str
    turns: Sequence[Turn]
    tools: Sequence[str]
    kind: str = field(default="chat", init=False)


@dataclass(frozen=True)
class Preformatted:
    """Text whose lines matter."""

    text: str
    caption: str
    kind: str = field(default="preformatted", init=False)


Block = Figure | Table | Facts | Prose | Missing | Pair | Chat | Preformatted


@dataclass(frozen=True)
class Section:
    """One heading of the report."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class StageView:
    """One stage of the run as the report sees it.

    report: content of its `report.json`; empty when there is none.
    problem: why its artifact could not be read, or why there is none.
    """

    name: str
    record: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    def get(self, path: str) -> Any:
        """The value at a dotted path of the report, or None."""
        return dig(self.report, path)

    def metric(self, name: str) -> Any:
        """A metric of the stage, or None."""
        return (self.record.get("metrics") or {}).get(name)

    def missing(self, what: str) -> Missing:
        """A block that says that `what` is not there, and why."""
        return Missing(what, self.problem or "not recorded")


def dig(value: Any, path: str) -> Any:
    """The value at a dotted path of nested mappings, or None."""
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def counts_facts(counts: Any, caption: str) -> Facts | None:
    """Names and their counts, largest first; None when there are none."""
    if not isinstance(counts, Mapping) or not counts:
        return None
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Facts([(str(name), value_text(value)) for name, value in rows], caption)


def facts(values: Mapping[str, Any], caption: str) -> Facts | None:
    """The scalar values of a mapping, in its order; None when there are none."""
    scalars = {name: value for name, value in values.items() if not isinstance(value, (dict, list))}
    rows = [(name.replace("_", " "), value_text(value)) for name, value in scalars.items() if value is not None]
    return Facts(rows, caption) if rows else None


def metric_facts(view: StageView, caption: str) -> Block:
    """Scalar metrics of a stage."""
    return facts(dict(sorted((view.record.get("metrics") or {}).items())), caption) or view.missing(caption)


def clip(text: str, limit: int = EXAMPLE_CHARACTERS) -> str:
    """The beginning of a text."""
    return text if len(text) <= limit else text[:limit].rstrip() + " …"
