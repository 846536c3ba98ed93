"""The index of a checkpoint of Kimi K2 by 2,048 ranks: made on the meta device, whole, readable by other layouts."""

import json
import time
from collections.abc import Iterator

import pytest
import torch

from k2.config.model import ModelConfig
from k2.distributed.index import Index, Part
from k2.distributed.ownership import local_layout, owners, shard_layout
from k2.distributed.pieces import Piece, buckets, pieces_of
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.transformer import Transformer
from k2.planner.layout import Layout, layers_of_rank

K2 = ModelConfig()
KINDS = {"muon": ("weight", "momentum"), "adamw": ("weight", "exp_avg", "exp_avg_sq")}


def of_stage(layout: Layout, stage: int) -> list[LogicalTensor]:
    layers = set(layers_of_rank(K2, layout, stage))
    outside = {"embed_tokens": 0}
    last = layout.pp - 1
    return [
        tensor
        for tensor in logical_tensors(K2)
        if tensor.group != "none"
        and (tensor.layer in layers if tensor.layer is not None else outside.get(tensor.component, last) == stage)
    ]


def owned(layout: Layout) -> Iterator[list[Piece]]:
    """What each rank owns, as `DistributedPlan` divides it."""
    with torch.device("meta"):
        parameters = dict(Transformer(K2).named_parameters())
    shapes = {tensor.name: tensor.shape for tensor in logical_tensors(K2)}
    part = K2.n_routed_experts // layout.ep
    for stage in range(layout.pp):
        tensors = of_stage(layout, stage)
        dense = [tensor for tensor in tensors if tensor.shard_axis is None]
        yield from divided(dense, parameters, shapes, layout.data_parallel, None)
        for ep in range(layout.ep):
            experts = [t for t in local_layout(tensors, range(ep * part, (ep + 1) * part)) if t.shard_axis is not None]
            yield from divided(experts, parameters, shapes, layout.dp, part)


def divided(
    tensors: list[LogicalTensor],
    parameters: dict[str, torch.nn.Parameter],
    shapes: dict[str, tuple[int, ...]],
    members: int,
    experts: int | None,
) -> Iterator[list[Piece]]:
    lengths = {t.parameter: experts or len(parameters[t.parameter]) for t in tensors}
    for shards in owners(tensors, lengths, members):
        found = shard_layout(tensors, shards)
        states = {
            s.name: torch.empty(s.stop - s.start, *parameters[s.parameter].shape[1:], device="meta") for s in shards
        }
        yield [
            piece
            for group, kinds in KINDS.items()
            for kind in kinds
            for piece in pieces_of(states, [t for t in found if t.group == group], shapes, kind)
        ]


@pytest.mark.slow
def test_it_is_complete_and_any_layout_finds_its_rows() -> None:
    start = time.process_time()
    index = Index()
    for rank, pieces in enumerate(owned(Layout(pp=16, ep=16, dp=8))):
        for number, bucket in enumerate(buckets(pieces, 64 << 20)):
            for piece, offset in zip(bucket.pieces, bucket.offsets, strict=True):
                part = Part(piece.start, piece.stop, f"{rank:032}{number:032}", offset)
                index.add(piece.key, "float32", piece.shape, part)
    text = json.dumps(index.document())
    print(f"{len(index):,} tensors, {len(text) / 1e6:.0f} MB, {time.process_time() - start:.1f} s of CPU")
    assert len(text) < 200e6
    states = sum(len(KINDS[tensor.group]) for tensor in logical_tensors(K2) if tensor.group != "none")
    assert len(index) == states
    wanted = next(owned(Layout(pp=4, ep=64, dp=4)))
    for piece in wanted:
        parts = list(index.parts(piece.key, piece.shape, piece.start, piece.stop))
        assert parts[0][1].start <= piece.start
        assert parts[-1][1].stop >= piece.stop
    for tensor in logical_tensors(K2):
        if tensor.group != "none":
            assert list(index.parts(f"weight/{tensor.name}", tensor.shape, 0, tensor.shape[0]))
