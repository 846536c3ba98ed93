"""Using what was trained: `k2 chat`; and measuring: `k2 bench`."""

import runpy
import sys
from pathlib import Path

import click

from k2.errors import UserError


@click.command()
@click.argument("model", default="champion")
@click.option(
    "--format",
    "form",
    type=click.Choice(["int4", "bf16"]),
    default="int4",
    show_default=True,
    help="Which of the exported models.",
)
@click.option("--system", help="What the conversation starts with; nothing by default.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.6, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same answers.")
def chat(model: str, form: str, system: str | None, max_tokens: int, temperature: float, seed: int) -> None:
    """Talk to MODEL: an alias, the s3:// URI of an export, or a folder."""
    from k2.commands.inspect import resolve
    from k2.execution.local import object_store
    from k2.serving.chat import ChatSettings
    from k2.serving.chat import chat as converse
    from k2.store.artifacts import open_uri

    settings = ChatSettings(system, max_tokens, temperature, seed=seed)
    if Path(model).is_dir():
        folder = Path(model)
    else:
        with object_store() as store:
            folder = open_uri(store, resolve(store, model)).directory() / form
    converse(folder, settings=settings)


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


COMMANDS = (chat, bench)
