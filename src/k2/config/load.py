"""From a preset, a file and `--set` overrides to one validated configuration."""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from k2.config.base import Section
from k2.config.k2 import K2Config
from k2.config.reason import reason
from k2.errors import UserError


def preset_names() -> list[str]:
    """Names of the presets that come with k2."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets() if p.name.endswith(".yaml"))


def load_config(preset: str, document: Mapping[str, Any] | None = None) -> K2Config:
    """The preset with `document` merged over it.

    Raises:
        UserError: unknown preset, unknown field or bad value; the message names the dotted field, its value and
            what is allowed.
    """
    if preset not in preset_names():
        raise UserError(f"preset: {preset!r} is unknown; choose one of {', '.join(preset_names())}")
    text = next(p for p in _presets() if p.name == f"{preset}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text) or {}
    return validate(merge(values, document or {}) | {"preset": preset})


def merge_overrides(document: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`dotted.path=value` overrides merged over a document; values are YAML, the last one wins.

    Raises:
        UserError: an override is not of that form.
    """
    merged = dict(document)
    for override in overrides:
        merged = merge(merged, _parse_override(override))
    return merged


def read_document(path: Path) -> dict[str, Any]:
    """A YAML file with fields to merge over the preset.

    Raises:
        UserError: unreadable, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    return _mapping(value, str(path))


def parse_document(text: str, where: str) -> dict[str, Any]:
    """YAML or JSON text with fields to merge over the preset; empty text is an empty document.

    Raises:
        UserError: not YAML, or not a mapping.
    """
    try:
        return _mapping(yaml.safe_load(text), where)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {_first_line(error)}") from None


def validate(values: Mapping[str, Any]) -> K2Config:
    """Check plain values against the schema.

    Raises:
        UserError: naming every bad field.
    """
    try:
        return K2Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(item) for item in error.errors())) from None


def _presets() -> list[Any]:
    return list(files("k2.config").joinpath("presets").iterdir())


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected fields such as `pretrain: {{lr: 3e-4}}`, found {type(value).__name__}")
    return value


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r}: write it as dotted.path=value, for example pretrain.seed=3")
    nested: Any = yaml.safe_load(value)
    if isinstance(nested, str):
        nested = _number(nested)
    for name in reversed(path.split(".")):
        nested = {name: nested}
    return _mapping(nested, "--set")


def _number(text: str) -> str | float:
    """YAML 1.1 reads 3e-4 as text; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; nested mappings are merged, anything else is replaced."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{path}: no such field; {_known(item['loc'])}"
    return f"{path}: {reason(item)}" if path else reason(item)


def _known(location: tuple[str | int, ...]) -> str:
    section: type[Section] = K2Config
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        inner = _section_type(field.annotation) if field else None
        if inner is None:
            return "see `k2 config show`"
        section = inner
    return f"the fields are {', '.join(section.model_fields)}"


def _section_type(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _first_line(error: Exception) -> str:
    return str(error).replace("\n", " ")[:200]
