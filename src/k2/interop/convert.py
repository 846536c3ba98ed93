"""Checkpoints of ours from Hugging Face folders and back: one tensor in memory, resumable, visible when complete."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from k2.config.export import ExportConfig
from k2.errors import UserError
from k2.execution.contract import Progress
from k2.interop.codec import encode
from k2.interop.digests import combined, verified
from k2.interop.folder import companions, write_checkpoint_companions, write_hf_companions
from k2.interop.source import LogicalTensors
from k2.interop.staging import Staging, complete, lock, staged
from k2.model.hf import write_index, write_shards
from k2.model.layout import logical_tensors
from k2.model.storage import INDEX, INT4_GROUP, SHARD_BYTES, Format, Shard, cut
from k2.model.tensor_files import write_file

VERSION = 1
"""Raise it when the same request would give other bytes."""


@dataclass(frozen=True)
class Target:
    """What to make.

    weights: subfolder of the weights: `model` in a checkpoint, "" in a Hugging Face folder.
    settings: everything else that the bytes of the result depend on.
    """

    format: Format
    weights: str
    group_size: int = INT4_GROUP
    shard_bytes: int = SHARD_BYTES
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """What was made.

    tensors: logical tensors, one for each matrix of each expert.
    bytes: size of the stored values.
    source: SHA-256 over the names and contents of the files it was made from.
    ignored: tensors of the source that the model does not use.
    """

    folder: str
    format: Format
    tensors: int
    bytes: int
    source: str
    ignored: int


def import_checkpoint(
    source: Path, out: Path, form: Format | None, progress: Progress, shard_bytes: int = SHARD_BYTES
) -> Converted:
    """Make a checkpoint of ours from a Hugging Face folder; `form` None takes bfloat16 if the source's head has it.

    Raises UserError; then nothing is visible at `out`.
    """
    tensors = LogicalTensors(source)
    kept: Format = "bf16" if tensors.files.stored["lm_head.weight"].dtype == "BF16" else "fp32"
    target = Target(form or kept, "model", shard_bytes=shard_bytes)

    def finish(folder: Path) -> None:
        write_checkpoint_companions(tensors, folder, target.format)

    return _convert(tensors, out, target, finish, progress)


def export_checkpoint(source: Path, out: Path, form: Format, settings: ExportConfig, progress: Progress) -> Converted:
    """Make a Hugging Face folder from a checkpoint of ours (or from another folder).

    Raises UserError; then nothing is visible at `out`.
    """
    tensors = LogicalTensors(source)
    target = Target(form, "", shard_bytes=settings.shard_bytes, settings=settings.model_dump(mode="json"))

    def finish(folder: Path) -> None:
        write_hf_companions(tensors, folder, form, target.group_size, settings)

    return _convert(tensors, out, target, finish, progress)


def write_folder(source: Path, folder: Path, form: Format, group_size: int, settings: ExportConfig) -> None:
    """`export_checkpoint` into a folder that something else publishes."""
    tensors = LogicalTensors(source)
    require_groups(tensors, form, group_size)
    shards = cut(logical_tensors(tensors.config), form, settings.shard_bytes, group_size)
    write_shards(shards, lambda t: encode(t, tensors[t.name], form, group_size), folder)
    write_hf_companions(tensors, folder, form, group_size, settings)


def require_groups(tensors: LogicalTensors, form: Format, group_size: int) -> None:
    """Raises UserError when the routed experts cannot be cut into groups along their inputs."""
    for name in ("hidden_size", "moe_intermediate_size") if form == "int4" else ():
        width = getattr(tensors.config, name)
        if width % group_size:
            raise UserError(f"int4: config.json: {name} is {width}, allowed are multiples of the group, {group_size}")


def _convert(
    tensors: LogicalTensors, out: Path, target: Target, finish: Callable[[Path], None], progress: Progress
) -> Converted:
    require_groups(tensors, target.format, target.group_size)
    layout = logical_tensors(tensors.config)
    shards = cut(layout, target.format, target.shard_bytes, target.group_size)
    with lock(out) as journal:
        source = combined(verified(tensors.directory, companions(tensors.directory) + _weight_files(tensors)))
        request = {"source": source, "version": VERSION, **asdict(target)}
        if not complete(out, request):
            staging = staged(out, journal, request)
            _write(tensors, shards, target, staging, progress)
            write_index(shards, staging.folder / target.weights)
            finish(staging.folder)
            staging.publish()
    total = sum(part.bytes for shard in shards for part in shard.stored)
    return Converted(str(out), target.format, len(layout), total, source, tensors.ignored)


def _weight_files(tensors: LogicalTensors) -> list[str]:
    files = tensors.files.files
    listed = files[0].parent / INDEX
    return [str(path.relative_to(tensors.directory)) for path in [*files, *([listed] if listed.is_file() else [])]]


def _write(tensors: LogicalTensors, shards: list[Shard], target: Target, staging: Staging, progress: Progress) -> None:
    for number, shard in enumerate(shards, 1):
        name = str(Path(target.weights) / shard.file)
        if not staging.has(name):
            values = (v for t in shard.tensors for v in encode(t, tensors[t.name], target.format, target.group_size))
            with staging.writing(name) as path:
                write_file(path, shard.stored, values)
        progress.update(number, len(shards), "files")
