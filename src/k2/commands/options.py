"""Options that several commands share."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from k2.errors import UserError

if TYPE_CHECKING:
    from k2.config.k2 import K2Config

Command = TypeVar("Command", bound=Callable[..., Any])


def override_options(command: Command) -> Command:
    """`--config` and `--set`."""
    file = click.option(
        "--config", "file", type=click.Path(path_type=Path), help="YAML with fields merged over the preset."
    )
    field = click.option(
        "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override one field; repeatable."
    )
    return file(field(command))


def configuration(command: Command) -> Command:
    """`--preset`, `--config` and `--set`."""
    preset = click.option("--preset", default="tiny", show_default=True, help="The configuration to start from.")
    return preset(override_options(command))


json_output = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def load(preset: str, file: Path | None, overrides: Sequence[str]) -> "tuple[K2Config, dict[str, Any]]":
    """The configuration, and what was changed against the preset as one document.

    Raises:
        UserError: unknown preset or field, bad value.
    """
    from k2.config.load import load_config, merge_overrides, read_document

    document = merge_overrides(read_document(file) if file else {}, overrides)
    return load_config(preset, document), document


def echo(result: Any, as_json: bool, text: str) -> None:
    """Print a result for people or for programs."""
    click.echo(json.dumps(result, indent=1, sort_keys=True) if as_json else text)


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """`name=value` options as a dictionary.

    Raises:
        UserError: one has no `=`.
    """
    split = [value.partition("=") for value in values]
    for (_, equals, _), value in zip(split, values, strict=True):
        if not equals:
            raise UserError(f"{option} {value!r}: write it as name=value")
    return {name: value for name, _, value in split}
