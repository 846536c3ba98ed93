"""The exported folders as transformers sees them: complete keys, equal logits, equal answers."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from k2.config.export import ExportConfig
from k2.model import hf
from k2.model.generate import Engine
from k2.model.sampling import SamplingConfig
from k2.quant.checkpoint import load_int4
from k2.quant.int4 import dequantize, quantize
from k2.serving.chat_template import encode_chat
from k2.stages.export import run
from tests.quant.tiny import model, prompts, tokenizer, write_checkpoint

QUANTIZED_SEED = 1
"""The two checkpoints differ, so that mixing them up would show."""


@pytest.fixture
def result(stage_harness, make_artifact, tmp_path):
    """The stage's result on a real store."""
    rl = make_artifact("rl", write_checkpoint(tmp_path / "rl"))
    files = write_checkpoint(tmp_path / "qat", QUANTIZED_SEED)
    quantized = make_artifact("quantize", files | {"quantization.json": b'{"bits": 4, "group_size": 32}'})
    return stage_harness(run, ExportConfig(shard_bytes=100_000), {"model": rl, "quantized": quantized})


def read(folder):
    """transformers' model with its exact weights in float32, and what it missed or did not expect."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    # Packed weights are dequantised by the first forward pass, in the type of their scales.
    with torch.no_grad():
        loaded(prompts())
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return loaded


def logits(ours):
    with torch.no_grad():
        return ours.logits(ours(prompts())[0])


def greedy(ours, count):
    samples = Engine(ours).generate(prompts().tolist(), 1, SamplingConfig(count, temperature=0.0))
    return [sample.token_ids for (sample,) in samples]


def reference_greedy(theirs, count):
    out = theirs.generate(
        prompts(), attention_mask=torch.ones_like(prompts()), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return out[:, prompts().shape[1] :].tolist()


def test_everything_about_the_export(result):
    directory = result.artifact.directory()
    _bf16_equals_ours(directory / "bf16")
    _int4_equals_ours(directory / "int4")
    _chat_is_ours(directory / "int4")
    _generation_ends_a_turn(directory / "int4")
    assert result.artifact.statistics == result.metrics
    assert result.metrics["bits_per_weight"] == pytest.approx(4.5, abs=0.05)
    assert result.metrics["int4_bytes"] < result.metrics["bf16_bytes"]


def _bf16_equals_ours(folder):
    ours, theirs = hf.load(folder), read(folder)
    assert theirs.dtype == torch.bfloat16
    theirs.float()
    with torch.no_grad():
        assert torch.allclose(theirs(prompts()).logits, logits(ours), atol=2e-5, rtol=1e-4)
    assert reference_greedy(theirs, 8) == greedy(ours, 8)
    assert torch.equal(
        ours.state_dict()["lm_head.weight"].bfloat16(), model().state_dict()["lm_head.weight"].bfloat16()
    )


def _int4_equals_ours(folder):
    ours, theirs = load_int4(folder), read(folder)
    masters = model(QUANTIZED_SEED).state_dict()
    stacked = dict(theirs.named_parameters())
    for name in ("layers.1.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"):
        trained = dequantize(*quantize(masters[name], 32))
        assert torch.equal(stacked[f"model.{name}"], trained), name
        assert torch.equal(ours.state_dict()[name], trained.float()), name
    torch.nn.Module.float(theirs)  # transformers' own `float` refuses, though the weights are plain by now
    with torch.no_grad():
        assert torch.allclose(theirs(prompts()).logits, logits(ours), atol=2e-5, rtol=1e-4)
    assert reference_greedy(theirs, 8) == greedy(ours, 8)


def _chat_is_ours(folder):
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tools = [{"type": "function", "function": {"name": "timer", "parameters": {"type": "object", "properties": {}}}}]
    messages = [{"role": "user", "content": "Set a timer 12"}]
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    ours = encode_chat(tokenizer(), messages, tools, add_generation_prompt=True, default_system=None)
    assert list(ids) == ours.ids


def _generation_ends_a_turn(folder):
    special = tokenizer().special
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [special["<|im_end|>"], special["[EOS]"]]
    assert generation.temperature == 0.6
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "deepseek_v3"
    assert config.eos_token_id == generation.eos_token_id
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
