"""A configuration as YAML in which every field explains itself."""

import json
from collections.abc import Iterator
from typing import Any

from k2.config.base import Section, is_semantic


def render(section: Section) -> str:
    """YAML of the resolved values; each line carries the field's comment."""
    return "\n".join(_lines(section, 0)) + "\n"


def _lines(section: Section, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        note = field.description or (type(value).__doc__ or "").partition("\n")[0]
        note += "" if is_semantic(type(section), name) else " (does not change the result)"
        comment = f"  # {note.strip()}" if note.strip() else ""
        if isinstance(value, Section):
            yield f"{indent}{name}:{comment}"
            yield from _lines(value, depth + 1)
        elif isinstance(value, tuple) and value and all(isinstance(item, Section) for item in value):
            yield f"{indent}{name}:{comment}"
            yield from _items(value, depth + 1)
        else:
            yield f"{indent}{name}: {_scalar(value)}{comment}"


def _items(values: tuple[Any, ...], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for value in values:
        first, *rest = _lines(value, depth + 1)
        yield f"{indent}- {first.strip()}"
        yield from rest


def _scalar(value: Any) -> str:
    """JSON is YAML; tuples and mappings become flow style."""
    return json.dumps(value, ensure_ascii=False, default=str)
