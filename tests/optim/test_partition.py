"""Every parameter has exactly one optimizer, at every size."""

from dataclasses import replace

import pytest
import torch

from k2.config.model import ModelConfig
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.partition import partition
from tests.optim.tiny import TINY


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"q_lora_rank": None}), ModelConfig()])
def test_each_value_has_exactly_one_optimizer(config: ModelConfig) -> None:
    found = shapes(config)
    parts = partition(logical_tensors(config), found)
    muon = sum(block.count * block.shape[0] * block.shape[1] for block in parts.blocks)
    adamw = sum(torch.Size(found[name]).numel() for name in parts.adamw)
    assert muon + adamw == sum(torch.Size(shape).numel() for shape in found.values())
    assert {block.parameter for block in parts.blocks} | set(parts.adamw) == set(found)
    matrices = {name for name, shape in found.items() if len(shape) > 1}
    assert matrices & set(parts.adamw) == {"embed_tokens.weight", "lm_head.weight"}


def test_kimi_k2_has_every_expert_matrix_alone() -> None:
    config = ModelConfig()
    parts = partition(logical_tensors(config), shapes(config))
    experts = [block for block in parts.blocks if ".experts." in block.parameter]
    assert sum(block.count for block in experts) == 60 * 384 * 3
    assert {block.shape for block in experts} == {(2048, 7168), (7168, 2048)}


def test_an_unmatched_parameter_fails() -> None:
    with pytest.raises(ValueError, match="surprise"):
        partition(logical_tensors(TINY), shapes(TINY) | {"surprise.weight": (4, 4)})


def test_a_missing_half_fails() -> None:
    layout = [t for t in logical_tensors(TINY) if not t.name.endswith("mlp.experts.2.up_proj.weight")]
    with pytest.raises(ValueError, match="gate_up_proj"):
        partition(layout, shapes(TINY))


def test_two_optimizers_for_one_parameter_fail() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    layout = [replace(t, group="adamw") if t.name == name else t for t in logical_tensors(TINY)]
    with pytest.raises(ValueError, match="gate_up_proj"):
        partition(layout, shapes(TINY))


def test_blocks_view_the_stacked_parameter() -> None:
    block = next(
        b for b in partition(logical_tensors(TINY), shapes(TINY)).blocks if b.parameter.endswith("experts.gate_up_proj")
    )
    weight = torch.arange(4 * 16 * 16.0).view(4, 16, 16)
    assert block.of(weight).shape == (4, 8, 16)
    assert block.of(weight).data_ptr() == weight.data_ptr()
