"""`k2 pipeline`: the DAGs for Kubeflow Pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from k2.commands.options import echo, json_output

if TYPE_CHECKING:
    from k2.config.deployment import Deployment
    from k2.platform.render import Rendering

Command = TypeVar("Command", bound=Callable[..., Any])

deployment_option = click.option(
    "--deployment",
    "deployment_file",
    type=click.Path(path_type=Path),
    required=True,
    envvar="K2_DEPLOYMENT",
    show_envvar=True,
    help="YAML that says where pipelines run.",
)
RESERVED_REVISION = "0" * 40
"""Stands for the commit in renderings that are committed themselves."""


@click.group()
def pipeline() -> None:
    """Compile, upload and run the DAGs on Kubeflow Pipelines."""


def _revision(command: Command) -> Command:
    return click.option("--revision", default="", envvar="K2_REVISION", help="Git commit, kept in the version's tags.")(
        command
    )


def _names(command: Command) -> Command:
    return click.option("--pipeline", "names", multiple=True, help="Only this pipeline; repeatable.")(command)


@pipeline.command(name="compile")
@deployment_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("compiled"), show_default=True, help="Folder.")
@_names
@_revision
@json_output
def compile_(deployment_file: Path, out: Path, names: tuple[str, ...], revision: str, as_json: bool) -> None:
    """Write each pipeline as KFP's intermediate representation and as Kubernetes resources."""
    deployment, renderings = _render(deployment_file, names)
    out.mkdir(parents=True, exist_ok=True)
    for each in renderings:
        (out / f"{each.pipeline}.yaml").write_text(each.ir(), encoding="utf-8")
        resources = each.resources(deployment.kubeflow.namespace, revision)
        (out / f"{each.pipeline}.resources.yaml").write_text(resources, encoding="utf-8")
    versions = {each.pipeline: each.version for each in renderings}
    echo(versions, as_json, "\n".join(f"{out / name}.yaml  {version}" for name, version in versions.items()))


def _render(file: Path, names: tuple[str, ...]) -> "tuple[Deployment, list[Rendering]]":
    from k2.config.deployment import Deployment
    from k2.platform.documents import read_section
    from k2.platform.render import PIPELINES, render

    deployment = read_section(file, Deployment)
    return deployment, [render(name, deployment) for name in names or PIPELINES]


COMMANDS = (pipeline,)
