"""Using what was trained: `k2 chat`; and measuring: `k2 bench`."""

import runpy
import sys
from pathlib import Path

import click

from k2.errors import UserError

COMMANDS: tuple[click.Command, ...] = ()


@click.command()
@click.argument("topic", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def bench(topic: str | None, as_json: bool) -> None:
    """Run the benchmarks of one topic, or list the topics."""
    folder = Path(__file__).parents[3] / "benchmarks"
    topics = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if topic is None:
        click.echo("\n".join(topics))
        return
    if topic not in topics:
        raise UserError(f"bench {topic!r}: no such topic; there are {', '.join(topics)}")
    sys.argv = [topic, *(["--json"] if as_json else [])]
    runpy.run_path(str(folder / f"{topic}.py"), run_name="__main__")


COMMANDS = (bench,)
