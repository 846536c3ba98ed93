"""The table of tensors: published counts, one place for every value, the published scaling factors."""

import math

import pytest

from k2.config.model import ModelConfig
from k2.model.layout import (
    ParameterCounts,
    cache_values_per_token,
    derived_scaling,
    flops_per_token,
    logical_tensors,
    parameter_counts,
    routed_scaling,
)

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    num_attention_heads=128,
    first_k_dense_replace=3,
    n_routed_experts=256,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
)
MOONLIGHT = ModelConfig(
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    moe_intermediate_size=1408,
    intermediate_size=11264,
)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (ModelConfig(), 1_026_408_232_448, 32_861_500_928),
        (DEEPSEEK_V3, 671_026_419_200, 37_552_297_472),
        (MOONLIGHT, 15_960_110_208, 2_914_776_192),
    ],
)
def test_counts_of_published_models(config: ModelConfig, total: int, active: int) -> None:
    assert parameter_counts(config) == ParameterCounts(total, active)


def test_groups_follow_the_report() -> None:
    groups = {tensor.component: tensor.group for tensor in logical_tensors(MOONLIGHT)}
    assert groups["embed_tokens"] == groups["lm_head"] == groups["norm"] == groups["kv_a_layernorm"] == "adamw"
    assert groups["gate"] == groups["experts.up_proj"] == groups["q_proj"] == groups["o_proj"] == "muon"
    assert groups["e_score_correction_bias"] == "none"


def test_quantised_are_the_routed_experts_only() -> None:
    quantised = {tensor.component for tensor in logical_tensors(ModelConfig()) if tensor.quantized}
    assert quantised == {"experts.gate_proj", "experts.up_proj", "experts.down_proj"}


def test_head_rows_cover_the_projection() -> None:
    clipped = [tensor for tensor in logical_tensors(ModelConfig()) if tensor.head_rows]
    assert {tensor.component for tensor in clipped} == {"q_b_proj", "kv_b_proj"}
    for tensor in clipped:
        rows = tensor.head_rows
        assert rows is not None
        assert rows.heads * rows.per_head == tensor.shape[0]
        assert rows.content == 128


@pytest.mark.parametrize(("experts", "chosen", "published"), [(384, 8, 2.827), (64, 6, 2.446), (256, 8, 2.827)])
def test_scaling_factors_of_published_models(experts: int, chosen: int, published: float) -> None:
    assert derived_scaling(experts, chosen) == published


def test_scaling_of_one_expert_is_one_and_an_explicit_value_wins() -> None:
    assert derived_scaling(7, 1) == 1.0
    assert routed_scaling(DEEPSEEK_V3) == 2.5


def test_flops_count_weights_twice_and_grow_with_context() -> None:
    config = ModelConfig()
    weights = parameter_counts(config).active - config.vocab_size * config.hidden_size
    assert math.isclose(flops_per_token(config, 1), 2 * weights, rel_tol=1e-3)
    pair = 64 * (192 + 128) * config.num_hidden_layers
    assert flops_per_token(config, 4097) - flops_per_token(config, 1) == 4096 * pair


def test_cache_is_the_latent_and_one_rotary_key() -> None:
    config = ModelConfig()
    full = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    assert cache_values_per_token(config) == 576
    assert round(full / 576, 1) == 35.6
