"""Using what was trained: `k2 chat`; measuring: `k2 bench`; and what a model is and costs: `k2 model info`."""

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2.commands.options import echo, json_output, load
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.config.model import ModelConfig


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
    from k2.store.lease import reading

    settings = ChatSettings(system, max_tokens, temperature, seed=seed)
    if Path(model).is_dir():
        folder = Path(model)
    else:
        with object_store() as store, reading(store, uri := resolve(store, model)):
            folder = open_uri(store, uri).directory() / form
    converse(folder, settings=settings)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("topic", required=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def bench(topic: str | None, options: tuple[str, ...], as_json: bool) -> None:
    """Run the benchmarks of one topic, or list the topics; OPTIONS such as `--rounds 3` go to the benchmark."""
    folder = Path(__file__).parents[3] / "benchmarks"
    topics = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if topic is None:
        click.echo("\n".join(topics))
        return
    if topic not in topics:
        raise UserError(f"bench {topic!r}: no such topic; there are {', '.join(topics)}")
    sys.path.insert(0, str(folder))
    sys.argv = [topic, *options, *(["--json"] if as_json else [])]
    runpy.run_path(str(folder / f"{topic}.py"), run_name="__main__")


@click.group()
def model() -> None:
    """Look at models."""


@model.command()
@click.argument("target", default="tiny")
@click.option("--context", type=click.IntRange(1), help="Tokens of a sequence; by default the model's longest.")
@json_output
def info(target: str, context: int | None, as_json: bool) -> None:
    """Print parameters by part, operations and bytes per token, and sizes of the weights.

    TARGET is a preset or a folder with a config.json.
    """
    from k2.model.cost import model_info

    config = _model_config(target)
    made = model_info(config, context or config.max_position_embeddings)
    echo(made, as_json, _info_text(made))


def _model_config(target: str) -> "ModelConfig":
    if not Path(target).is_dir():
        return load(target, None, ())[0].pretrain.model
    from k2.model.hf import read_config

    return read_config(Path(target))


def _info_text(made: dict[str, Any]) -> str:
    token, counts = made["token"], made["parameters"]
    lines = [f"{'parameters':<18}{'total':>22}{'active':>20}"]
    rows = [*made["parts"].items(), ("all", counts)]
    lines += [f"  {name:<16}{part['total']:>22,}{part['active']:>20,}" for name, part in rows]
    lines += ["", f"one token, context {made['context']:,}"]
    lines += [
        f"  {name:<16}{token[f'flops_{name}'] / 1e9:>22,.3f} GFLOPs" for name in ("forward", "training", "decode")
    ]
    names = {"weights read": "weight_bytes", "cache kept": "cache_bytes", "cache read": "cache_read_bytes"}
    lines += [f"  {name:<16}{token[key]:>22,} bytes" for name, key in names.items()]
    lines += ["", "weights"]
    return "\n".join(lines + [f"  {form:<16}{size / 1e9:>22.1f} GB" for form, size in made["weight_bytes"].items()])


COMMANDS = (chat, bench, model)
