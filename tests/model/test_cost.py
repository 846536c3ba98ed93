"""The published numbers of Kimi K2, and the cost of a token counted a second way."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from k2.cli import main
from k2.config.model import ModelConfig
from k2.model.cost import model_info, parameters_by_part, token_cost
from k2.model.layout import parameter_counts
from tests.model.reference import SHAPES, build
from tests.model.test_layout import DEEPSEEK_V3, MOONLIGHT


@pytest.mark.parametrize("config", [ModelConfig(), DEEPSEEK_V3, MOONLIGHT, SHAPES["two_shared"]])
def test_parts_are_the_whole(config: ModelConfig) -> None:
    parts, whole = parameters_by_part(config), parameter_counts(config)
    assert sum(part.total for part in parts.values()) == whole.total
    assert sum(part.active for part in parts.values()) == whole.active


def test_parts_of_kimi_k2() -> None:
    """k2-facts 1.7."""
    parts = {name: counts.total for name, counts in parameters_by_part(ModelConfig()).items()}
    assert parts == {
        "embedding": 1_174_405_120,
        "head": 1_174_405_120,
        "attention": 61 * (101_124_096 - 2048),
        "norms": 61 * (2048 + 2 * 7168) + 7168,
        "dense layers": 396_361_728,
        "router": 60 * (2_752_512 + 384),
        "routed experts": 1_014_686_023_680,
        "shared experts": 60 * 44_040_192,
    }


@pytest.mark.parametrize("shape", ["plain", "full_query", "two_shared"])
def test_forward_operations_are_those_torch_counts(shape: str) -> None:
    """Torch counts every pair of a sequence, seen or masked; ours count the causal half and its diagonal."""
    config, length = SHAPES[shape], 17
    model = build(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.arange(length)[None])[0])
    pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    masked = config.num_hidden_layers * pair * length * (length - 1)
    assert counter.get_total_flops() == length * token_cost(config, length).flops_forward + masked


def test_cost_of_decoding_kimi_k2() -> None:
    cost = token_cost(ModelConfig(), 4096, "int4")
    assert cost.cache_bytes == 61 * 576 * 2
    assert cost.cache_read_bytes == 4096 * cost.cache_bytes
    active = parameter_counts(ModelConfig()).active - 1_174_405_120  # the embedding is looked up
    routed = parameters_by_part(ModelConfig())["routed experts"].active
    biases = 60 * 384 * 2  # float32
    assert cost.weight_bytes == pytest.approx(2 * (active - routed) + biases + 4.5 / 8 * routed, rel=1e-5)
    assert cost.flops_decode - token_cost(ModelConfig(), 0).flops_decode == 4096 * 61 * 64 * 2 * (512 + 64 + 512)


def test_model_info_prints_the_published_counts() -> None:
    result = CliRunner().invoke(main, ["model", "info", "k2-1t"])
    assert result.exit_code == 0
    for number in ("1,026,408,232,448", "32,861,500,928", "1,014,686,023,680", "70,272", "594.2 GB", "1029.2 GB"):
        assert number in result.stdout
    made = json.loads(CliRunner().invoke(main, ["model", "info", "k2-1t", "--json", "--context", "100"]).stdout)
    assert made == json.loads(json.dumps(model_info(ModelConfig(), 100)))
    assert made["token"]["flops_training"] == 3 * made["token"]["flops_forward"]


def test_model_info_of_a_folder_and_of_nothing(tmp_path) -> None:
    from k2.model import hf

    hf.write_config(hf.to_hf_config(SHAPES["groups"]), tmp_path)
    made = json.loads(CliRunner().invoke(main, ["model", "info", str(tmp_path), "--json"]).stdout)
    assert made["parameters"]["total"] == parameter_counts(SHAPES["groups"]).total
    wrong = CliRunner().invoke(main, ["model", "info", "k3"])
    assert wrong.exit_code == 2
    assert "k2-1t" in wrong.stderr
