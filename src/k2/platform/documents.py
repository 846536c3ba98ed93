"""Reading the YAML files that a platform team writes, with errors that name the field and the fix."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from k2.config.base import Section
from k2.config.load import read_document
from k2.config.reason import reason, shown
from k2.errors import UserError

Document = TypeVar("Document", bound=Section)


def read_section(path: Path, kind: type[Document]) -> Document:
    """A YAML file as a section.

    Raises:
        UserError: unreadable, or naming every bad field with what is allowed.
    """
    return validated(read_document(path), kind, str(path))


def validated(values: dict[str, Any], kind: type[Document], where: str) -> Document:
    """Plain values as a section.

    Raises:
        UserError: naming every bad field with what is allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(item, kind) for item in error.errors())) from None


def _explain(item: Any, kind: type[Section]) -> str:
    path = ".".join(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        *parents, name = item["loc"]
        sections = list(_sections_at(parents, kind))
        fields = ", ".join(sections[0].model_fields) if sections else "in docs/pipelines.md"
        return f"{path}: there is no field {name!r} here; the fields are {fields}"
    if item["type"] == "missing":
        return f"{path}: is missing; {_comment(item['loc'], kind)}"
    if item["type"] == "string_pattern_mismatch":
        return f"{path}: {shown(item['input'])} does not fit; {_comment(item['loc'], kind)}"
    return f"{path}: {reason(item)}" if path else reason(item)


def _comment(location: tuple[str | int, ...], kind: type[Section]) -> str:
    """What the innermost field on the way says about itself."""
    for end in range(len(location), 0, -1):
        name = str(location[end - 1])
        for section in _sections_at(location[: end - 1], kind):
            if name in section.model_fields:
                return f"{name}: {_description(section.model_fields[name])}"
    return "see docs/pipelines.md"


def _description(field: FieldInfo) -> str:
    """A field's comment; of one without, what its section is."""
    return field.description or next(inspect.getdoc(section) or "" for section in _section_types(field.annotation))


def _sections_at(location: Any, kind: type[Section]) -> Iterator[type[Section]]:
    """The section type behind a path; entries of mappings and lists stand for their element's type."""
    inside: tuple[type[Section], ...] = (kind,)
    for part in location:
        fields = [section.model_fields[part].annotation for section in inside if part in section.model_fields]
        inside = tuple(found for field in fields for found in _section_types(field)) if fields else inside
    yield from inside


def _section_types(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _section_types(inner)
