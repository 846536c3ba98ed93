"""`k2 images`: what a cluster pulls, and copying it to another registry."""

import shutil
import subprocess
from pathlib import Path

import click

from k2.commands.options import echo, json_output
from k2.commands.pipeline import deployment_option
from k2.errors import StageError, UserError


@click.group()
def images() -> None:
    """List and copy the images that a deployment file names. The platform needs no others."""


@images.command(name="list")
@deployment_option
@json_output
def list_(deployment_file: Path, as_json: bool) -> None:
    """Print each image by digest."""
    found = _images(deployment_file)
    echo(found, as_json, "\n".join(found.values()))


@images.command()
@deployment_option
@click.option("--to", "registry", required=True, help="Registry and path to copy to, such as registry.internal/k2.")
@click.option("--dry-run", is_flag=True, help="Only say what would be copied.")
@json_output
def mirror(deployment_file: Path, registry: str, dry_run: bool, as_json: bool) -> None:
    """Copy each image, digest unchanged, with skopeo; print the `images` that the deployment file then needs."""
    copies = {name: (image, _moved(image, registry)) for name, image in _images(deployment_file).items()}
    if not dry_run:
        for source, target in copies.values():
            _copy(source, target)
    targets = {name: target for name, (_, target) in copies.items()}
    echo(targets, as_json, "\n".join(["images:", *(f"  {name}: {target}" for name, target in targets.items())]))


def _images(file: Path) -> dict[str, str]:
    from k2.config.deployment import Deployment
    from k2.platform.documents import read_section

    return dict(sorted(read_section(file, Deployment).images.items()))


def _moved(image: str, registry: str) -> str:
    """`old/path/cpu@sha256:d` as `REGISTRY/cpu@sha256:d`."""
    return f"{registry.rstrip('/')}/{image.rpartition('/')[2]}"


def _copy(source: str, target: str) -> None:
    if shutil.which("skopeo") is None:
        raise UserError("skopeo is not installed: install it, or copy what `k2 images list` prints with another tool")
    # A digest names what is read; where it is written a tag has to, and the digest stays what it was.
    tagged = f"{target.partition('@')[0]}:{target.rpartition(':')[2][:12]}"
    command = ["skopeo", "copy", "--all", "--preserve-digests", f"docker://{source}", f"docker://{tagged}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"{source} was not copied to {tagged}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


COMMANDS = (images,)
