"""`k2 pipeline`: the DAG for Kubeflow."""

from pathlib import Path

import click


@click.group()
def pipeline() -> None:
    """Compile the DAG for Kubeflow Pipelines."""


@pipeline.command(name="compile")
@click.argument("output", type=click.Path(path_type=Path), default=Path("k2.yaml"))
def compile_(output: Path) -> None:
    """Write the pipeline as KFP intermediate representation (YAML)."""
    from kfp import compiler

    from pipelines.k2 import k2

    compiler.Compiler().compile(k2, str(output))
    click.echo(str(output))


COMMANDS = (pipeline,)
