"""Checkpoints: round trip, bytes, outside readers, and what is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from k2.config.model import ModelConfig, RopeScaling
from k2.errors import UserError
from k2.model import hf
from k2.model.layout import logical_tensors, parameter_counts
from k2.model.rope import softmax_scale
from k2.model.transformer import Transformer
from tests.model.reference import SHAPES, TINY, build


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_config_round_trip(shape: str) -> None:
    config = SHAPES[shape]
    back = hf.from_hf_config(json.loads(json.dumps(hf.to_hf_config(config))))
    assert back == config.model_copy(update={"routed_scaling_factor": back.routed_scaling_factor})
    assert hf.to_hf_config(back) == hf.to_hf_config(config)


KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 384, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.827, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1,
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
    "rms_norm_eps": 1e-06, "rope_theta": 50000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "use_cache": True, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0,
                     "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
"""k2-facts 1.2, as Kimi K2's config.json has it."""


def test_the_released_config_is_read_as_kimi_k2() -> None:
    config = hf.from_hf_config(KIMI_K2)
    scaling = RopeScaling()
    assert config == ModelConfig(routed_scaling_factor=2.827, rope_scaling=scaling, max_position_embeddings=131072)
    assert parameter_counts(config).total == 1_026_408_232_448
    assert softmax_scale(config) == pytest.approx(0.130861, abs=1e-6)
    written = hf.to_hf_config(config)
    kept = {name: value for name, value in KIMI_K2.items() if name in written and name != "model_type"}
    assert {name: written[name] for name in kept} == kept


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [("mscale", 0.0), ("mscale_all_dim", 0.0), ("beta_fast", 32.0), ("original_max_position_embeddings", 131072)],
)
def test_fields_that_position_scaling_leaves_out_have_the_references_defaults(left_out: str, expected: float) -> None:
    scaling = {name: value for name, value in KIMI_K2["rope_scaling"].items() if name != left_out}
    read = hf.from_hf_config(KIMI_K2 | {"rope_scaling": scaling}).rope_scaling
    assert getattr(read, left_out) == expected


def test_transformers_reads_the_config_as_ours(tmp_path: Path) -> None:
    hf.write_config(hf.to_hf_config(SHAPES["yarn"]), tmp_path)
    rope = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 8.0, 50000.0)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert hf.read_config(tmp_path).rope_scaling == SHAPES["yarn"].rope_scaling


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 40_000])
@pytest.mark.parametrize("folder", ["model", ""])
def test_round_trip_is_exact_and_its_bytes_repeat(tmp_path: Path, shard_bytes: int, folder: str) -> None:
    model = build(TINY).float()
    for name in "ab":
        hf.save(model, TINY, tmp_path / name, folder=folder, shard_bytes=shard_bytes)
    files = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")) for name in "ab"]
    assert files[0] == files[1]
    assert (len(files[0]) > 3) == (shard_bytes == 40_000)
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files[0])
    loaded = hf.load(tmp_path / "a")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_bfloat16_keeps_the_selection_bias_in_float32(tmp_path: Path) -> None:
    model = build(TINY).float()
    hf.save(model, TINY, tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert set(stored) == {tensor.name for tensor in logical_tensors(TINY)}
    bias = "layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(stored[f"model.{bias}"], model.state_dict()[bias])
    assert stored["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", ["plain", "yarn", "full_query", "groups"])
def test_transformers_loads_an_export_and_agrees(tmp_path: Path, shape: str) -> None:
    model = build(SHAPES[shape]).float()
    model.compute_dtype = torch.float32
    hf.save(model, model.config, tmp_path, folder="")
    reference, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(12)[None] * 7 % TINY.vocab_size
    torch.testing.assert_close(model.logits(model(tokens)[0]), reference(tokens).logits, rtol=1e-4, atol=1e-4)
    reference.save_pretrained(tmp_path / "back")
    ours = hf.load(tmp_path / "back")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.state_dict().items())


def broken(tmp_path: Path, change: str) -> str:
    hf.save(build(TINY).float(), TINY, tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    elif change == "extra":
        tensors["model.layers.1.mlp.experts.6.up_proj.weight"] = torch.zeros(1)
    elif change == "misshapen":
        tensors["model.norm.weight"] = torch.zeros(47)
    elif change == "not finite":
        tensors["lm_head.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        hf.load(tmp_path)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            "missing",
            r"tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight: expected in .*/model, found nowhere; 1 ",
        ),
        ("extra", r"tensor model\.layers\.1\.mlp\.experts\.6\.up_proj\.weight in .*/model\.safetensors: unknown"),
        ("misshapen", r"model\.norm\.weight in .*: expected shape \[48\], found \[47\]"),
        ("not finite", r"lm_head\.weight: expected finite values, found 1 NaN or infinite in .*/model\.safetensors"),
        ("truncated", r"model\.safetensors: not a complete safetensors file: expected (\d+) bytes, found \d+"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path: Path, change: str, named: str) -> None:
    assert re.search(named, broken(tmp_path, change))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        hf.load(tmp_path)
    hf.write_config({"model_type": "llama"}, tmp_path)
    with pytest.raises(UserError, match="model_type is 'llama'"):
        hf.load(tmp_path)
    hf.write_config(hf.to_hf_config(ModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)), tmp_path)
    with pytest.raises(UserError, match=r"no \.safetensors"):
        hf.CheckpointTensors(tmp_path)


def test_prediction_layers_after_the_last_are_ignored(tmp_path: Path) -> None:
    model = build(TINY).float()
    hf.save(model, TINY, tmp_path)
    save_file({"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model" / "mtp.safetensors")
    assert isinstance(hf.load(tmp_path), Transformer)
