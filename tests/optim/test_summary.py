"""`k2 optim show`: complete for every preset, proved against the model built on the meta device."""

import json

import pytest
import torch
from click.testing import CliRunner

from k2.cli import main
from k2.config.load import load_config, preset_names
from k2.config.optimizer import OptimizerConfig
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.partition import partition
from k2.optim.summary import summarize
from tests.optim.tiny import TINY


@pytest.mark.parametrize("preset", preset_names())
def test_every_value_of_every_preset_has_exactly_one_rule(preset: str) -> None:
    config = load_config(preset).pretrain
    with torch.device("meta"):
        model = Transformer(config.model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    totals = summarize(config.model, config.optimizer)["totals"]
    parts = partition(logical_tensors(config.model), shapes)
    muon = sum(block.count * block.shape[0] * block.shape[1] for block in parts.blocks)
    trained = sum(p.numel() for p in model.parameters())
    assert totals["muon"]["values"] == muon
    assert totals["adamw"]["values"] == trained - muon
    assert totals["none"]["values"] == sum(b.numel() for name, b in model.named_buffers() if "correction_bias" in name)
    assert all(len(t.shape) == 2 for t in logical_tensors(config.model) if t.group == "muon")


def test_command_prints_kimi_k2_as_table_and_json() -> None:
    text = CliRunner().invoke(main, ["optim", "show", "k2-1t"])
    assert text.exit_code == 0
    assert "64 heads of rows 128 by sqrt(gamma), 64 by gamma" in text.output
    assert "23,040" in text.output  # 60 layers of 384 experts
    rows = json.loads(CliRunner().invoke(main, ["optim", "show", "k2-1t", "--json"]).output)["rows"]
    by_name = {row["component"]: row for row in rows}
    assert by_name["experts.gate_proj"]["shape"] == [2048, 7168]
    assert by_name["experts.gate_proj"]["group"] == by_name["kv_b_proj"]["group"] == by_name["gate"]["group"] == "muon"
    assert by_name["kv_b_proj"]["qk_clip"] == "64 heads of rows 128 by sqrt(gamma), 128 by 1"
    assert {row["component"] for row in rows if row["group"] == "none"} == {"e_score_correction_bias"}


def test_adamw_for_all_leaves_muon_nothing() -> None:
    totals = summarize(TINY, OptimizerConfig(matrices="adamw"))["totals"]
    assert totals["muon"] == {"tensors": 0, "values": 0}


def test_an_unknown_preset_is_a_user_error() -> None:
    assert CliRunner().invoke(main, ["optim", "show", "surprise"]).exit_code == 2
