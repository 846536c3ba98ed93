"""`k2 schedule`: recurring runs from a file."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from k2.commands.options import echo, json_output
from k2.commands.pipeline import connect, deployment_option

if TYPE_CHECKING:
    from k2.config.deployment import Deployment
    from k2.platform.schedule_file import Schedules
    from k2.platform.schedules import Change

Command = TypeVar("Command", bound=Callable[..., Any])

SIGNS = {"create": "+", "replace": "~", "enable": "~", "disable": "~", "tidy": "~", "delete": "-", "keep": "="}

schedule_file = click.argument("file", type=click.Path(path_type=Path), default=Path("schedules.yaml"))


@click.group()
def schedule() -> None:
    """Keep Kubeflow's recurring runs as FILE says (schedules.yaml)."""


@schedule.command()
@schedule_file
@deployment_option
@json_output
def plan(file: Path, deployment_file: Path, as_json: bool) -> None:
    """Show what `apply` would change."""
    from k2.platform.schedules import plan as compare

    schedules, deployment = _read(file, deployment_file)
    _show(compare(connect(deployment), schedules, deployment), as_json)


@schedule.command()
@schedule_file
@deployment_option
@json_output
def apply(file: Path, deployment_file: Path, as_json: bool) -> None:
    """Create, replace and remove recurring runs; one apply at a time, by a lease in the object store."""
    from k2.platform.schedules import apply as change
    from k2.store.client import Store

    schedules, deployment = _read(file, deployment_file)
    store = Store.from_environment()
    store.check()
    _show(change(connect(deployment), store, schedules, deployment), as_json)


@schedule.command()
@schedule_file
@deployment_option
@click.option(
    "--late-minutes", type=click.IntRange(1), default=60, show_default=True, help="Later than this, a run is missing."
)
@json_output
def check(file: Path, deployment_file: Path, late_minutes: int, as_json: bool) -> None:
    """Exit with 1 when the last run of a schedule did not begin; for the CronJob behind the alert."""
    from datetime import timedelta

    from k2.platform.schedule_check import check as look

    schedules, deployment = _read(file, deployment_file)
    found = look(connect(deployment), schedules, timedelta(minutes=late_minutes))
    lines = [f"{'late' if each.late else 'ok':<6}{each.name} {each.why}" for each in found]
    echo([asdict(each) for each in found], as_json, "\n".join(lines))
    if any(each.late for each in found):
        sys.exit(1)


def _read(file: Path, deployment_file: Path) -> "tuple[Schedules, Deployment]":
    from k2.config.deployment import Deployment
    from k2.platform.documents import read_section
    from k2.platform.schedule_file import Schedules

    return read_section(file, Schedules), read_section(deployment_file, Deployment)


def _show(changes: "Iterable[Change]", as_json: bool) -> None:
    """Each change as it comes, or all as JSON."""
    rows = []
    for each in changes:
        rows.append({"action": each.action, "name": each.name, "why": each.why})
        if not as_json:
            click.echo(f"{SIGNS[each.action]} {each.name}: {each.action} ({each.why})")
    if as_json:
        echo(rows, as_json, "")


COMMANDS = (schedule,)
