"""`k2 run`: the whole recipe on this machine."""

import json
import sys
from pathlib import Path

import click

from k2.commands.options import configuration, json_output, load

PIPELINES = (
    "k2",
    "ablations/qk_clip",
    "ablations/qk_clip_decay",
    "ablations/muonclip_vs_adamw",
    "ablations/sparsity",
    "ablations/heads",
    "ablations/rl_vs_sft",
    "ablations/fp8_storage",
)
"""Files of `pipelines/` that run on a preset alone."""


@click.command()
@configuration
@click.option("--corpus", multiple=True, help="Text to train on: file, folder, glob or s3:// prefix; repeatable.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where reports go."
)
@click.option(
    "--pipeline",
    type=click.Choice(PIPELINES),
    default="k2",
    show_default=True,
    help="The recipe, or an ablation study.",
)
@json_output
def run(
    preset: str,
    file: Path | None,
    overrides: tuple[str, ...],
    corpus: tuple[str, ...],
    runs: Path,
    pipeline: str,
    as_json: bool,
) -> None:
    """Run the whole recipe here, or another pipeline: the same DAG that a cluster runs.

    Object storage is the S3 service in K2_S3_ENDPOINT; without one, an embedded server keeps everything under .k2/.
    What was made before is not made again, and an interrupted run continues.
    """
    if corpus:
        overrides = (*overrides, f"corpus.paths={json.dumps([_absolute(path) for path in corpus])}")
    config, document = load(preset, file, overrides)

    from k2.execution.local import run_pipeline

    result = run_pipeline(config, document, runs, sys.stderr, pipeline)
    if as_json:
        click.echo(json.dumps(result.summary, indent=1))
    for stage, record in result.summary["stages"].items():
        if record.get("error"):
            click.echo(f"error: {stage}: {record['error']['message']}", err=True)
    click.echo(f"{result.summary['status']}: {result.folder / 'report.html'}", err=True)
    sys.exit(result.exit_code)


def _absolute(path: str) -> str:
    return path if path.startswith("s3://") else str(Path(path).absolute())


COMMANDS = (run,)
