"""As much of PromQL as it takes to list the metrics and labels of a query. promtool checks the grammar."""

import re
from dataclasses import dataclass
from itertools import pairwise

TOKEN = re.compile(
    r"""(?P<skip>\s+)|(?P<string>"(?:\\.|[^"\\])*")|(?P<range>\[[^\]]*\])|(?P<number>\d[\d.]*(?:[eE][+-]?\d+)?[smhdwy]?)
    |(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)|(?P<operator>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){},])""",
    re.VERBOSE,
)
LABEL = re.compile(r'"[a-z_][a-z0-9_]*"')
"""What an argument of label_replace or label_join is, when it names a label."""
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
KEYWORDS = GROUPING | {"and", "or", "unless", "offset", "bool", "inf", "nan"}


@dataclass(frozen=True)
class Query:
    """metrics: pairs of a metric and the labels that its selector matches; grouped: labels in by(...), on(...) ..."""

    metrics: tuple[tuple[str, frozenset[str]], ...]
    grouped: frozenset[str]


def parse(query: str) -> Query:
    """The metrics and labels of a query.

    Raises:
        ValueError: a character that PromQL does not have.
    """
    tokens = _tokens(query.replace("$__rate_interval", "5m"))
    metrics: list[tuple[str, frozenset[str]]] = []
    grouped: set[str] = set()
    position = 0
    while position < len(tokens):
        kind, text = tokens[position]
        following = tokens[position + 1][1] if position + 1 < len(tokens) else ""
        if kind == "name" and text in GROUPING and following == "(":
            end = tokens.index(("operator", ")"), position)
            grouped |= {value for each, value in tokens[position + 2 : end] if each == "name"}
            position = end
        elif kind == "name" and text not in KEYWORDS and following != "(" and not _aggregation(tokens, position):
            end = tokens.index(("operator", "}"), position) if following == "{" else position
            metrics.append((text, _matched(tokens[position:end])))
            position = end
        elif kind == "string" and LABEL.fullmatch(text):
            grouped.add(text.strip('"'))
        position += 1
    return Query(tuple(metrics), frozenset(grouped))


def _aggregation(tokens: list[tuple[str, str]], position: int) -> bool:
    """`sum by (...) (...)`: a name before by or without is no metric."""
    return position + 1 < len(tokens) and tokens[position + 1][1] in ("by", "without")


def _matched(tokens: list[tuple[str, str]]) -> frozenset[str]:
    operators = {"=", "!=", "=~", "!~"}
    return frozenset(left[1] for left, right in pairwise(tokens) if left[0] == "name" and right[1] in operators)


def _tokens(query: str) -> list[tuple[str, str]]:
    found, position = [], 0
    while position < len(query):
        match = TOKEN.match(query, position)
        if match is None:
            raise ValueError(f"{query[position]!r} at {position} of {query!r}")
        if match.lastgroup not in ("skip", None):
            found.append((str(match.lastgroup), match.group()))
        position = match.end()
    return found
