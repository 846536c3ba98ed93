"""`k2 sandbox`: a Python program in a sandbox of a cluster."""

from pathlib import Path

import click

from k2.commands.pipeline import deployment_option
from k2.errors import StageError


@click.command()
@deployment_option
@click.option("--namespace", help="Namespace of the pod; by default the deployment file's.")
@click.option("--seconds", default=10.0, show_default=True, help="Time that the program may take.")
@click.option("--memory", default="512Mi", show_default=True, help="Memory that it may use.")
@click.argument("program", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def sandbox(
    deployment_file: Path, namespace: str | None, seconds: float, memory: str, program: Path, files: tuple[Path, ...]
) -> None:
    """Run PROGRAM with FILES beside it where the deployment file's `sandbox` says, and print its output.

    What a cluster lets code that a model wrote do can be tried out with this.
    """
    from k2.config.deployment import Deployment
    from k2.launch.cluster import Cluster
    from k2.platform.documents import read_section
    from k2.sandbox.contract import Limits
    from k2.sandbox.pod import PodSandbox

    deployment = read_section(deployment_file, Deployment)
    cluster = Cluster.connect(namespace or deployment.kubeflow.namespace)
    given = {path.name: path.read_bytes() for path in (program, *files)}
    limits = Limits(wall_s=seconds, memory=memory)
    result = PodSandbox(cluster, deployment).run(["python", program.name], given, limits)
    click.echo(result.output, nl=False)
    if result.exceeded:
        raise StageError(f"the program was ended: too much {result.exceeded}")
    if result.exit_code:
        raise StageError(f"the program ended with {result.exit_code}")


COMMANDS = (sandbox,)
