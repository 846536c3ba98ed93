"""`k2 config`: presets and their fields."""

from pathlib import Path

import click

from k2.commands.options import echo, json_output, load, override_options


@click.group()
def config() -> None:
    """Look at presets and resolved configurations."""


@config.command()
@click.argument("preset", default="tiny")
@override_options
@json_output
def show(preset: str, file: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print the resolved configuration with a comment for every field."""
    from k2.config.render import render

    resolved, _ = load(preset, file, overrides)
    echo(resolved.model_dump(mode="json"), as_json, render(resolved).rstrip())


@config.command()
@json_output
def presets(as_json: bool) -> None:
    """List the presets."""
    from k2.config.load import preset_names

    echo(preset_names(), as_json, "\n".join(preset_names()))


COMMANDS = (config,)
