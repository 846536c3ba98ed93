"""`k2 gc`: remove what nothing needs from the object store."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from k2.commands.options import echo, json_output
from k2.monitoring.format import size

if TYPE_CHECKING:
    from k2.store.gc import Plan

LISTED = 10_000
"""Objects between two signs of life while the store is listed."""


@click.group()
def gc() -> None:
    """Remove artifacts that no alias, recent run or reader needs, and what unfinished work left behind."""


@gc.command()
@click.option(
    "--days",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="For how long runs keep their artifacts, and unfinished work stays; longer than your longest run.",
)
@click.option(
    "--grace-hours",
    type=click.FloatRange(0),
    default=24.0,
    show_default=True,
    help="For how long anything new stays, whoever needs it.",
)
@json_output
def plan(days: float, grace_hours: float, as_json: bool) -> None:
    """Show what would go and what stays, and why; removes nothing but plans of over a week ago."""
    from k2.execution.local import object_store
    from k2.monitoring.events import progress_for
    from k2.store.gc import Policy
    from k2.store.sweep import plan as make

    progress = progress_for("gc")
    with object_store() as store:
        made = make(
            store, _kinds(), Policy(days, grace_hours),
            lambda seen: None if seen % LISTED else progress.event("listed", objects=seen),
        )  # fmt: skip
    rows = {"kept": [asdict(each) for each in made.kept], "items": [asdict(each) for each in made.items]}
    echo({"plan": made.digest, "policy": asdict(made.policy), "stays": made.stays, **rows}, as_json, _text(made))


@gc.command()
@click.argument("digest")
@click.option(
    "--settle-s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds in which a reader that found an artifact just before says so.",
)
@json_output
def apply(digest: str, settle_s: float, as_json: bool) -> None:
    """Remove what the plan DIGEST lists, as far as it is still garbage. Safe to repeat, and to kill."""
    from k2.execution.local import object_store
    from k2.monitoring.events import progress_for
    from k2.store.sweep import apply as sweep

    progress = progress_for("gc")
    with object_store() as store:
        swept = sweep(
            store, _kinds(), digest, settle_s=settle_s,
            report=lambda done, total: progress.update(done, total, "objects"),
        )  # fmt: skip
    rows = {"removed": [asdict(item) for item in swept.removed], "restored": swept.restored, "skipped": swept.skipped}
    lines = [f"restored {name}: it is needed after all" for name in swept.restored]
    lines += [f"skipped {name}: gone, or needed by now" for name in swept.skipped]
    lines.append(f"removed {len(swept.removed)} of the plan's items, {size(swept.bytes)}")
    echo(rows | {"bytes": swept.bytes}, as_json, "\n".join(lines))


def _kinds() -> frozenset[str]:
    """The kinds of artifacts that K2 makes; whatever else is in the bucket is not K2's to remove."""
    from k2.execution.registry import ALL_STAGES
    from k2.interop.publish import KIND

    return frozenset({*ALL_STAGES, KIND})


def _text(made: "Plan") -> str:
    lines = [f"keep    {each.name}: {each.why}" for each in made.kept]
    lines += [f"remove  {item.what} {item.name}: {size(item.bytes)}, {item.why}" for item in made.items]
    stays, going = made.stays, size(sum(item.bytes for item in made.items))
    kept = f"{stays['artifacts']} artifacts stay, {size(stays['bytes'])}"
    lines.append(f"{kept}; {len(made.items)} things would go, {going}")
    if stays["foreign_objects"]:
        lines.append(f"{stays['foreign_objects']} objects are not K2's and stay, {size(stays['foreign_bytes'])}")
    return "\n".join([*lines, f"to do it: k2 gc apply {made.digest[:12]}"])


COMMANDS = (gc,)
