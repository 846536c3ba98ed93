"""INT4 folders: names, layout, ignore list, and what our own reader gets back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2.config.export import ExportConfig
from k2.config.model import ModelConfig
from k2.errors import UserError
from k2.interop.convert import write_folder
from k2.interop.source import LogicalTensors
from k2.model import hf
from k2.model.layout import logical_tensors
from k2.quant.checkpoint import (
    IGNORE,
    as_exported,
    bits_per_weight,
    load_int4,
    quantization_config,
)
from k2.quant.fake_quant import fake_quantize
from tests.quant.tiny import TINY, model, prompts, write_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of one checkpoint, INT4 in many shards."""
    base = tmp_path_factory.mktemp("quant")
    write_checkpoint(base / "checkpoint")
    for name, form, shard_bytes in (("bf16", "bf16", 2**30), ("int4", "int4", 40_000), ("again", "int4", 40_000)):
        (base / name).mkdir()
        write_folder(base / "checkpoint", base / name, form, 32, ExportConfig(shard_bytes=shard_bytes))
    return base


def test_files_repeat_byte_for_byte(folders):
    names = sorted(path.name for path in (folders / "int4").iterdir())
    assert "model.safetensors.index.json" in names
    assert names == sorted(path.name for path in (folders / "again").iterdir())
    assert all((folders / "int4" / n).read_bytes() == (folders / "again" / n).read_bytes() for n in names)


def test_only_routed_experts_are_packed_and_all_of_them(folders):
    index = json.loads((folders / "int4" / "model.safetensors.index.json").read_text())
    stored = set(index["weight_map"])
    expected = set()
    for t in logical_tensors(TINY):
        expected |= {f"{t.name}_packed", f"{t.name}_scale", f"{t.name}_shape"} if t.quantized else {t.name}
    assert stored == expected
    total = sum(v.nbytes for p in (folders / "int4").glob("*.safetensors") for v in load_file(p).values())
    assert index["metadata"]["total_size"] == total


def test_types_and_shapes_are_those_of_the_format(folders):
    stored = hf.CheckpointTensors(folders / "int4")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    packed, scale, shape = (stored[f"{name}_{part}"] for part in ("packed", "scale", "shape"))
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (64, 4))
    assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (64, 1))
    assert (shape.dtype, shape.tolist()) == (torch.int32, [64, 32])
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_our_reader_gets_the_exported_weights_bit_for_bit(folders):
    read = load_int4(folders / "int4").state_dict()
    for name, value in as_exported(model(), 32).state_dict().items():
        assert torch.equal(read[name], value), name
    read = hf.load(folders / "bf16").state_dict()
    for name, value in as_exported(model(), None).state_dict().items():
        assert torch.equal(read[name], value), name


def test_exported_logits_equal_the_fake_quantised_model_bit_for_bit(folders):
    """The QAT model's own forward pass, its other weights in bfloat16 as every reader has them."""
    trained = as_exported(model(), None)
    state = trained.state_dict()
    for name, value in model().state_dict().items():
        if ".mlp.experts." in name:
            state[name].copy_(value)  # the masters, which the transform rounds on the fly
    trained.set_weight_transform(fake_quantize(32))
    read = load_int4(folders / "int4")
    with torch.no_grad():
        own, exported = (m.logits(m(prompts())[0]) for m in (trained, read))
    assert torch.equal(own, exported)


def test_mapping_counts_plain_names(folders):
    tensors = LogicalTensors(folders / "int4")
    assert list(tensors) == [t.name for t in logical_tensors(TINY)]
    assert len(tensors) == len(logical_tensors(TINY))


def test_a_missing_part_is_named(folders, tmp_path):
    write_folder(folders / "checkpoint", tmp_path, "int4", 32, ExportConfig())
    stored = load_file(tmp_path / "model.safetensors")
    removed = "model.layers.1.mlp.experts.0.up_proj.weight"
    save_file({n: v for n, v in stored.items() if not n.startswith(removed)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(removed)):
        load_int4(tmp_path)


@pytest.mark.parametrize("config", [TINY, ModelConfig(), TINY.model_copy(update={"q_lora_rank": None})])
def test_ignore_list_covers_exactly_what_stays(config):
    def ignored(module: str) -> bool:
        return any(re.match(i[3:], module) if i.startswith("re:") else i == module for i in IGNORE)

    small = config.model_copy(update={"n_routed_experts": 8, "num_hidden_layers": 3, "num_experts_per_tok": 2})
    for tensor in logical_tensors(small):
        is_matrix = tensor.group != "none" and len(tensor.shape) == 2 and tensor.component != "embed_tokens"
        if is_matrix:
            assert ignored(tensor.name.removesuffix(".weight")) != tensor.quantized, tensor.name


def test_configuration_is_that_of_k2_thinking_plus_the_router():
    config = quantization_config(32)
    assert config["ignore"][:4] == [
        "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"
    ]  # fmt: skip
    assert config["ignore"][4:] == ["re:.*mlp\\.gate$"]
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "observer": "minmax",
        "observer_kwargs": {}, "actorder": None, "block_structure": None, "dynamic": False,
    }  # fmt: skip


def test_kimi_k2_takes_four_and_a_half_bits_a_routed_weight():
    routed, whole = bits_per_weight(ModelConfig(), 32)
    assert routed == pytest.approx(4.5, abs=1e-4)
    assert 4.6 < whole < 4.7  # 594 GB for 1026 billion weights
