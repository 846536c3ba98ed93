"""`k2 optim show`: which optimizer owns which matrix."""

from pathlib import Path

import click

from k2.commands.options import echo, json_output, load, override_options


@click.group()
def optim() -> None:
    """Look at a model the way the optimizer does."""


@optim.command()
@click.argument("preset", default="tiny")
@override_options
@json_output
def show(preset: str, file: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print the partition of PRESET's parameters: for each kind of matrix its optimizer, shape, number and clipping."""
    from k2.optim.summary import summarize, table

    resolved, _ = load(preset, file, overrides)
    summary = summarize(resolved.pretrain.model, resolved.pretrain.optimizer)
    echo(summary, as_json, table(summary))


COMMANDS = (optim,)
