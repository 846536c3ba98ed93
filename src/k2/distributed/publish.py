"""Several ranks publish one artifact: each writes and uploads the tensors it was given, the first one commits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2.distributed import peers
from k2.model.hf import part, write_index
from k2.model.layout import LogicalTensor
from k2.model.storage import cut, file_names
from k2.model.tensor_files import write_file
from k2.store.artifacts import Artifact, ArtifactWriter


def write_weights(state: Mapping[str, Tensor], tensors: Sequence[LogicalTensor], directory: Path) -> None:
    """Write this rank's tensors in float32, one at a time, as safetensors files, and the index of all ranks' files.

    All ranks call it; together they have every tensor once, as they lie in their `state`.
    """
    mine = [shard for shard in cut(tensors, "fp32") if shard.tensors]
    counts = peers.from_all(len(mine))
    start = sum(counts[: peers.rank()])
    names = file_names(sum(counts))[start : start + len(mine)]
    named = [replace(shard, file=name) for shard, name in zip(mine, names, strict=True)]
    directory.mkdir(parents=True, exist_ok=True)
    for shard in named:
        values = (part(state[tensor.parameter], tensor).to(torch.float32) for tensor in shard.tensors)
        write_file(directory / shard.file, shard.stored, values)
    everyone = peers.from_all([replace(shard, tensors=()) for shard in named])
    if peers.rank() == 0:
        write_index([shard for found in everyone for shard in found], directory)


def publish(output: ArtifactWriter, **statistics: Any) -> Artifact:
    """The artifact of what all ranks wrote; the first one's manifest is the last object, and makes it visible."""
    attempt = peers.from_first(output.attempt)
    others = peers.from_all(output.upload(attempt) if peers.rank() > 0 else [])
    return output.publish([entry for found in others for entry in found], **statistics)
