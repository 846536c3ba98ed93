"""Reading what was made: lineage, files, runs."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2.commands.options import echo, json_output
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.store.client import Store


@click.command()
@click.argument("uri", default="champion")
@json_output
def lineage(uri: str, as_json: bool) -> None:
    """Walk an artifact back to the documents it was made from. URI is an s3:// URI or an alias."""
    from k2.execution.local import object_store
    from k2.monitoring.lineage import lineage as walk
    from k2.monitoring.lineage import render_tree

    with object_store() as store:
        tree = walk(store, resolve(store, uri))
    echo(tree, as_json, render_tree(tree))


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
def fetch(uri: str, directory: Path) -> None:
    """Copy the verified files of an artifact (s3:// URI or alias) into a folder."""
    from k2.execution.local import object_store
    from k2.store.artifacts import open_uri
    from k2.store.lease import reading

    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: exists and is not empty; name a new folder")
    with object_store() as store, reading(store, found := resolve(store, uri)):
        artifact = open_uri(store, found)
        for name in artifact.files:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path(name), target)
    click.echo(str(directory))


@click.command()
@click.argument("run", required=False)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where runs are."
)
@json_output
def report(run: str | None, runs: Path, as_json: bool) -> None:
    """Print the summary of a run (the latest by default) and where its report is."""
    folders = sorted((p for p in runs.glob("*/summary.json")), key=lambda p: p.stat().st_mtime)
    found = runs / run / "summary.json" if run else (folders[-1] if folders else None)
    if found is None or not found.exists():
        raise UserError(f"{found or runs}: no finished run there; `k2 run` makes one")
    summary = json.loads(found.read_text())
    lines = [f"{name:<11}{s['status']:<9}{'cached' if s['cached'] else ''}" for name, s in summary["stages"].items()]
    echo(summary, as_json, "\n".join([*lines, str(found.with_name("report.html"))]))


def resolve(store: "Store", uri: str) -> str:
    """The URI behind an alias, or the URI itself."""
    from k2.store.aliases import read_alias

    if uri.startswith("s3://"):
        return uri
    alias = read_alias(store, uri)
    if alias.uri is None:
        raise UserError(f"{uri}: neither an s3:// URI nor an alias that is set; a passed gate sets `champion`")
    return alias.uri


COMMANDS = (lineage, fetch, report)
