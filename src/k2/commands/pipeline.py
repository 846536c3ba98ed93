"""`k2 pipeline`: the DAGs for Kubeflow Pipelines."""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from k2.commands.options import echo, json_output, pairs
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.config.deployment import Deployment
    from k2.platform.api import PipelinesApi
    from k2.platform.render import Rendering
    from k2.platform.runs import WhenRunning

log = logging.getLogger(__name__)

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


@click.group()
def pipeline() -> None:
    """Compile, upload and run the DAGs on Kubeflow Pipelines."""


def _revision(command: Command) -> Command:
    return click.option("--revision", default="", envvar="K2_REVISION", help="Git commit, kept in the version's tags.")(
        command
    )


def _names(command: Command) -> Command:
    return click.option(
        "--pipeline", "names", multiple=True, help="This pipeline instead of k2 and k2-retrain; repeatable."
    )(command)


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


@pipeline.command()
@deployment_option
@_names
@_revision
@json_output
def upload(deployment_file: Path, names: tuple[str, ...], revision: str, as_json: bool) -> None:
    """Put the pipelines on the API server; a version that is there already is left alone."""
    from k2.platform.versions import upload as put

    deployment, renderings = _render(deployment_file, names)
    results = put(connect(deployment), renderings, revision)
    lines = [f"{each.version}: {'uploaded' if each.new else 'there already'}" for each in results]
    echo([asdict(each) for each in results], as_json, "\n".join(lines))


@pipeline.command()
@deployment_option
@click.option("--pipeline", "name", default="k2", show_default=True, help="Which pipeline.")
@click.option("--version", help="Name of the version; the newest by default.")
@click.option("--param", "parameters", multiple=True, metavar="NAME=VALUE", help="A parameter; repeatable.")
@click.option("--name", "run_name", help="Name of the run. Under a name, submitting again adopts what is there.")
@click.option("--series", help="Start the next run of this series instead, as a CronJob does.")
@click.option(
    "--when-running",
    type=click.Choice(["allow", "forbid", "replace"]),
    default="forbid",
    show_default=True,
    help="What to do while a run of the series is going on.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=True),
    help="Refuse when the last days and one more run cost more; the deployment file's by default.",
)
@click.option("--budget-days", type=click.IntRange(1, 366), help="Days of the budget; the deployment file's, or 30.")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Refuse when what the deployment file names is not in kubectl's cluster.",
)
@click.option("--watch", "follow", is_flag=True, help="Follow the run to its end, and exit as it does.")
@json_output
def submit(
    deployment_file: Path,
    name: str,
    version: str | None,
    parameters: tuple[str, ...],
    run_name: str | None,
    series: str | None,
    when_running: "WhenRunning",
    budget: float | None,
    budget_days: int | None,
    check: bool,
    follow: bool,
    as_json: bool,
) -> None:
    """Start a run on Kubeflow Pipelines, once everything is there that it needs."""
    from k2.platform.runs import submit as start
    from k2.platform.runs import submit_next
    from k2.platform.versions import find_version

    if series and run_name:
        raise UserError("--name and --series: a run of a series gets its own name; give one of the two")
    values, deployment = pairs(parameters, "--param"), _deployment(deployment_file)
    _require_budget(deployment, budget, budget_days)
    api = connect(deployment)
    found = find_version(api, name, version)
    if check:
        _require_needs(deployment)
    run = submit_next(api, found, values, series, when_running) if series else start(api, found, values, run_name)
    if run is None:
        echo(None, as_json, f"a run of {series} is going on; nothing was started")
        return
    click.echo(f"{'adopted' if run.adopted else 'started'}: {run.name} {run.run_id}", err=True)
    if follow:
        _follow(api, run.run_id, as_json)
        return
    echo(asdict(run), as_json, run.run_id)


@pipeline.command()
@click.argument("run_id")
@deployment_option
@json_output
def watch(run_id: str, deployment_file: Path, as_json: bool) -> None:
    """Follow a run to its end; exits 0 when it succeeded and 1 otherwise. Ctrl-C leaves the run alone."""
    _follow(connect(_deployment(deployment_file)), run_id, as_json)


@pipeline.command()
@click.argument("run_id")
@deployment_option
@click.option("--wait", is_flag=True, help="Wait until the run has ended, its exit handler included.")
@json_output
def cancel(run_id: str, deployment_file: Path, wait: bool, as_json: bool) -> None:
    """Stop a run. Published steps stay, so the next run continues from them."""
    from k2.platform.runs import cancel as stop
    from k2.platform.runs import watch as follow

    api = connect(_deployment(deployment_file))
    before = stop(api, run_id)
    after = follow(api, run_id, sys.stderr) if wait else "CANCELING"
    state = before if before in ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED") else after
    echo({"run_id": run_id, "state": state}, as_json, state.lower())


@pipeline.command()
@deployment_option
@click.option("--keep", type=click.IntRange(1), default=5, show_default=True, help="Newest versions that stay anyway.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_output
def prune(deployment_file: Path, keep: int, dry_run: bool, as_json: bool) -> None:
    """Remove versions that no schedule and no live run uses."""
    from k2.platform.versions import prune as remove

    removed = remove(connect(_deployment(deployment_file)), keep, dry_run=dry_run)
    echo(removed, as_json, "\n".join(removed) or "nothing to remove")


def connect(deployment: "Deployment") -> "PipelinesApi":
    """The API server of a deployment, once it has answered.

    Raises:
        UserError: it does not, or is not what the deployment file says.
    """
    from k2.platform.api import PipelinesApi

    api = PipelinesApi(deployment.kubeflow)
    api.check()
    return api


def _require_needs(deployment: "Deployment") -> None:
    """The run's first step looks again, with its own rights; where there is no kubectl, it is the first to.

    Raises:
        UserError: something is missing, or the cluster does not answer.
    """
    from k2.launch.cluster import Cluster, ClusterError
    from k2.launch.preflight import require
    from k2.platform.needs import of_deployment

    try:
        cluster = Cluster.connect(deployment.kubeflow.namespace, patience_s=0.0)
    except UserError as error:
        log.warning("what the deployment file names is looked for by the run's first step: %s", error)
        return
    try:
        # What launchers may do is another account's business.
        require(cluster, of_deployment(deployment).model_copy(update={"rights": ()}))
    except ClusterError as error:
        raise UserError(f"{error}; `--no-check` submits without looking at kubectl's cluster") from None


def _require_budget(deployment: "Deployment", limit: float | None, days: int | None) -> None:
    """Of the options and the deployment file's `budget`, the first; a launcher asks again before each job.

    Raises:
        UserError: one more run does not fit, or what was spent cannot be read.
    """
    from k2.platform.guard import within_budget
    from k2.store.client import Store

    said = deployment.budget
    most = limit or (said.limit if said else None)
    if most is None:
        return
    store = Store.from_environment()
    store.check()
    fits, sums = within_budget(store, deployment.costs(), most, days or (said.days if said else 30))
    if not fits:
        where = "--budget" if limit else "budget in the deployment file"
        raise UserError(f"{where}: over budget: {sums}; wait, raise it, or make the run smaller")


def _follow(api: "PipelinesApi", run_id: str, as_json: bool) -> None:
    from k2.platform.runs import watch

    state = watch(api, run_id, sys.stderr)
    echo({"run_id": run_id, "state": state}, as_json, state.lower())
    sys.exit(0 if state == "SUCCEEDED" else 1)


def _deployment(file: Path) -> "Deployment":
    from k2.config.deployment import Deployment
    from k2.platform.documents import read_section

    return read_section(file, Deployment)


def _render(file: Path, names: tuple[str, ...]) -> "tuple[Deployment, list[Rendering]]":
    from k2.platform.render import RECIPES, render

    deployment = _deployment(file)
    return deployment, [render(name, deployment) for name in names or RECIPES]


COMMANDS = (pipeline,)
