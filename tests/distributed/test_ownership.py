"""Every value has exactly one owner, Newton-Schulz is balanced, and shards are what an optimizer accepts."""

from collections import Counter
from math import prod

import pytest
import torch
from torch import nn

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.distributed.ownership import Shard, local_layout, newton_schulz_work, owners, shard_layout
from k2.model.layout import LogicalTensor, logical_tensors
from k2.optim.muonclip import MuonClip
from k2.optim.partition import partition
from tests.training.small import MODEL

K2 = ModelConfig()


def shapes(layout: list[LogicalTensor]) -> dict[str, tuple[int, ...]]:
    """Of the parameters that these tensors are parts of."""
    found: dict[str, tuple[int, ...]] = {}
    for name in {tensor.parameter for tensor in layout}:
        parts = [tensor for tensor in layout if tensor.parameter == name]
        experts = {tensor.index for tensor in parts}
        rows = sum(part.shape[0] for part in parts) // len(experts)
        found[name] = (*(() if experts == {None} else (len(experts),)), rows, *parts[0].shape[1:])
    return found


def divided(config: ModelConfig, experts: range, sharded: bool, members: int) -> tuple[list[LogicalTensor], list]:
    layout = local_layout(logical_tensors(config), experts)
    layout = [t for t in layout if (t.shard_axis is not None) == sharded and t.group != "none"]
    return layout, owners(layout, {name: shape[0] for name, shape in shapes(layout).items()}, members)


@pytest.mark.parametrize(("sharded", "members"), [(False, 1), (False, 3), (False, 64), (True, 1), (True, 2), (True, 5)])
def test_every_entry_has_one_owner(sharded: bool, members: int) -> None:
    layout, shards = divided(MODEL, range(2, 4), sharded, members)
    assert len(shards) == members
    owned = Counter((s.parameter, entry) for own in shards for s in own for entry in range(s.start, s.stop))
    assert owned == Counter((name, entry) for name, shape in shapes(layout).items() for entry in range(shape[0]))


@pytest.mark.parametrize(("sharded", "members"), [(False, 3), (True, 1), (True, 2)])
def test_an_optimizer_can_own_the_shards_of_a_rank(sharded: bool, members: int) -> None:
    layout, shards = divided(MODEL, range(2, 4), sharded, members)
    full = shapes(layout)
    for own in shards:
        sizes = {shard.name: (shard.stop - shard.start, *full[shard.parameter][1:]) for shard in own}
        parts = partition(shard_layout(layout, own), sizes)
        assert {block.parameter for block in parts.blocks} | set(parts.adamw) == set(sizes)


def test_ranks_that_own_no_matrix_make_steps_and_count_clipped_heads() -> None:
    layout, shards = divided(MODEL, range(4), False, 64)
    full, without = shapes(layout), 0
    for own in shards:
        weights = {s.name: nn.Parameter(torch.ones(s.stop - s.start, *full[s.parameter][1:])) for s in own}
        optimizer = MuonClip(
            weights.items(), shard_layout(layout, own), OptimizerConfig(tau=1.0), 0.1, logical_tensors(MODEL)
        )
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.qk_clip.observe(torch.full((2, 2), 3.0))
        optimizer.step()
        assert optimizer.clip_report.clipped == 4
        assert all(bool((weight < 1).all()) for weight in weights.values())
        without += not optimizer.param_groups[0]["params"]
    assert without > 0


def test_a_whole_parameter_keeps_its_name_and_experts_stay_together() -> None:
    _, shards = divided(K2, range(24), True, 4)
    first = next(shard for shard in shards[0] if "down_proj" in shard.name)
    assert first == Shard(f"{first.parameter}[{first.start}:{first.stop}]", first.parameter, first.start, first.stop)
    assert first.stop - first.start == 6
    _, shards = divided(K2, range(24), False, 4)
    assert "layers.0.self_attn.q_b_proj.weight" in {shard.name for own in shards for shard in own}


@pytest.mark.parametrize(("sharded", "members", "excess"), [(False, 16, 1.05), (True, 8, 1.0), (True, 7, 1.05)])
def test_newton_schulz_work_and_optimizer_state_of_k2_are_balanced(sharded: bool, members: int, excess: float) -> None:
    layout, shards = divided(K2, range(24), sharded, members)
    work, values = [0] * members, [0] * members
    for member, own in enumerate(shards):
        for tensor in shard_layout(layout, own):
            work[member] += newton_schulz_work(tensor.shape) if tensor.group == "muon" else 0
            values[member] += prod(tensor.shape)
    assert max(work) <= excess * sum(work) / members
    assert max(values) <= 1.25 * sum(values) / members
    assert sum(values) == sum(tensor.size for tensor in layout)
