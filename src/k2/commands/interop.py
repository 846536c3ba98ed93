"""Checkpoints from and for other software: `k2 import`, and `k2 export` with two folders."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2.commands.options import configuration, echo, json_output
from k2.commands.stages import COMMANDS as STAGE_COMMANDS
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.model.storage import Format


@contextmanager
def _folder(source: str) -> Iterator[Path]:
    """The local folder of a path, an s3:// URI or an alias."""
    if Path(source).is_dir():
        yield Path(source)
        return
    from k2.commands.inspect import resolve
    from k2.execution.local import object_store
    from k2.store.artifacts import open_uri
    from k2.store.lease import reading

    if "/" in source and not source.startswith("s3://"):
        raise UserError(f"{source}: no such folder")
    with object_store() as store:
        uri = resolve(store, source)
        with reading(store, uri):
            folder = open_uri(store, uri).directory()
        yield folder


@click.command("import")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["bf16", "fp32"]),
    help="Precision of the checkpoint; by default the one the source's unquantised weights have.",
)
@click.option("--publish", is_flag=True, help="Also publish it in the object store and print its URI.")
@json_output
def import_(source: str, out: Path, form: "Format | None", publish: bool, as_json: bool) -> None:
    """Make a checkpoint from the Hugging Face folder SOURCE (bf16, fp32, FP8 in blocks, or INT4), in the folder OUT.

    Killed and started again, it continues. OUT appears when it is complete. A published checkpoint is what stages
    start from: `k2 sft --input model=URI`.
    """
    from k2.interop.convert import import_checkpoint
    from k2.monitoring.events import progress_for

    with _folder(source) as folder:
        made = import_checkpoint(folder, out, form, progress_for("import"))
    uri = _published(out) if publish else None
    echo(asdict(made) | {"artifact": uri}, as_json, uri or made.folder)


def _published(folder: Path) -> str:
    from k2.execution.local import object_store
    from k2.interop.publish import publish

    with object_store() as store:
        return publish(folder, store).uri


def _stage_export() -> click.Command:
    return next(command for command in STAGE_COMMANDS if command.name == "export")


@click.command("export")
@click.argument("checkpoint", required=False)
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["bf16", "fp32", "int4"]),
    default="bf16",
    show_default=True,
    help="Precision of OUT; int4 packs the routed experts.",
)
@configuration
@click.option("--input", "inputs", multiple=True, metavar="NAME=URI", help="The stage takes this artifact; repeatable.")
@json_output
@click.pass_context
def export(
    context: click.Context,
    /,
    checkpoint: str | None,
    out: Path | None,
    form: "Format",
    as_json: bool,
    inputs: tuple[str, ...],
    **settings: Any,
) -> None:
    """Make a Hugging Face folder OUT from CHECKPOINT: a folder, an s3:// URI or an alias.

    With no arguments: run the stage `export`, which makes the bf16 and int4 folders of a pipeline's models. Killed and
    started again, a conversion continues. OUT appears when it is complete.
    """
    if checkpoint is None:
        context.invoke(_stage_export(), inputs=inputs, as_json=as_json, **settings)
        return
    if out is None:
        raise UserError("k2 export CHECKPOINT OUT: name the folder to write")
    from k2.commands.options import load
    from k2.interop.convert import export_checkpoint
    from k2.monitoring.events import progress_for

    config, _ = load(settings["preset"], settings["file"], settings["overrides"])
    with _folder(checkpoint) as folder:
        made = export_checkpoint(folder, out, form, config.export, progress_for("export"))
    echo(asdict(made), as_json, made.folder)


COMMANDS = (import_, export)
