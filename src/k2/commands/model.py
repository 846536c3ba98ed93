"""Measuring: `k2 bench`; and what a model is and costs: `k2 model info`."""

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2.commands.options import echo, json_output, load
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.config.model import ModelConfig


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


COMMANDS = (bench, model)
