"""Sources in every format, made without our own code, and the commands run in this process."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import save_file
from torch import Tensor

from k2.cli import main
from k2.model import hf
from k2.model.layout import logical_tensors
from k2.quant.checkpoint import quantization_config
from tests.quant.tiny import TINY, model

BLOCK = (24, 40)
"""Divides no matrix of the model, so that blocks at the edges are incomplete."""


def k2(*arguments: object) -> Result:
    """Run a command; only its own errors are caught."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def logical_state(seed: int = 0) -> dict[str, Tensor]:
    """The model's tensors by their names in a checkpoint."""
    state = model(seed).state_dict()
    return {t.name: hf.part(state[t.parameter], t).clone() for t in logical_tensors(TINY)}


def loaded(folder: Path) -> dict[str, Tensor]:
    """The tensors our own loader gets from a checkpoint, by their names in it."""
    state = hf.load(folder).state_dict()
    return {t.name: hf.part(state[t.parameter], t) for t in logical_tensors(TINY)}


def write_hf(folder: Path, form: str, seed: int = 0) -> dict[str, Tensor]:
    """A Hugging Face folder of the model in `form`; returns the weights a reader must get."""
    folder.mkdir(parents=True, exist_ok=True)
    state = logical_state(seed)
    files, expected, quantization = {"fp32": plain, "bf16": plain, "fp8": fp8, "int4": int4}[form](state, form)
    config = hf.to_hf_config(TINY) | quantization
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(files)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: files[name].contiguous() for name in members}, folder / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return expected


def plain(state, form):
    stored = {n: v if form == "fp32" or "bias" in n else v.bfloat16() for n, v in state.items()}
    return stored, {n: v.float() for n, v in stored.items()}, {}


def fp8(state, form):
    """Blocks one by one, as DeepSeek-V3 describes them."""
    stored, expected, _ = plain(state, "bf16")
    for name in [n for n in state if n.endswith(("_proj.weight", "_with_mqa.weight"))]:
        value = state[name]
        weight = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
        factors = torch.empty(-(-value.shape[0] // BLOCK[0]), -(-value.shape[1] // BLOCK[1]))
        expected[name] = torch.empty(value.shape)
        for i in range(factors.shape[0]):
            for j in range(factors.shape[1]):
                place = (
                    slice(i * BLOCK[0], (i + 1) * BLOCK[0]),
                    slice(j * BLOCK[1], (j + 1) * BLOCK[1]),
                )
                factors[i, j] = value[place].abs().max() / 448
                weight[place] = (value[place] / factors[i, j]).to(torch.float8_e4m3fn)
                expected[name][place] = (weight[place].float() * factors[i, j]).bfloat16()
        stored |= {name: weight, f"{name}_scale_inv": factors}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    return stored, expected, {"quantization_config": quantization}


def int4(state, form):
    """Packed by compressed-tensors."""
    stored, expected, _ = plain(state, "bf16")
    for name in [n for n in state if ".experts." in n]:
        del stored[name]
        groups = state[name].unflatten(1, (-1, 32))
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        values = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8)
        expected[name] = (values.bfloat16() * scale[..., None]).flatten(1).float()
        stored[f"{name}_packed"] = pack_to_int32(values.flatten(1), 4)
        stored[f"{name}_scale"] = scale
        stored[f"{name}_shape"] = torch.tensor(state[name].shape)
    return stored, expected, {"quantization_config": quantization_config(32)}
