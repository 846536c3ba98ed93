"""Checkpoints in Hugging Face's form: DeepseekV3 `config.json` and safetensors with one tensor per expert matrix.

A checkpoint artifact holds `config.json` and its weights under `model/`; a Hugging Face folder holds both side by
side. `load` reads either. Tensors pass through memory one at a time, and the same weights always give the same bytes.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from k2.config.model import ModelConfig, RopeScaling
from k2.errors import UserError
from k2.model.layout import LogicalTensor, logical_tensors, routed_scaling
from k2.model.storage import INDEX, SHARD_BYTES, Format, Shard, cut, index
from k2.model.tensor_files import CheckpointTensors, write_file
from k2.model.transformer import Transformer

PLAIN_TYPES = ("F32", "BF16", "F16", "F64")
"""Types of tensors that are not quantised."""

FORMATS: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_SAME_NAME = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "initializer_range",
]


_OPTIONAL = {"n_group": 1, "topk_group": 1, "initializer_range": 0.02}
_FIXED: dict[str, Any] = {
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
"""What every K2 model has in common; a checkpoint that says otherwise is another model."""


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a DeepseekV3ForCausalLM, readable by transformers, vLLM and SGLang."""
    scaling = None if config.rope_scaling is None else {"type": "yarn", **config.rope_scaling.model_dump()}
    return {name: getattr(config, name) for name in _SAME_NAME} | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "routed_scaling_factor": routed_scaling(config),
        "rope_scaling": scaling,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "use_cache": True,
        **_FIXED,
    }


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a DeepseekV3-shaped `config.json`.

    Raises UserError naming a field that is missing, inconsistent, or says that this is another architecture.
    """
    _check_architecture(values)
    rope = values.get("rope_parameters") or {}
    fields = {**_OPTIONAL, **{name: values[name] for name in _SAME_NAME if name in values}}
    fields["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    fields["routed_scaling_factor"] = values.get("routed_scaling_factor")
    fields["rope_scaling"] = _rope_scaling(values.get("rope_scaling") or rope, values)
    missing = sorted(set(_SAME_NAME) - set(fields))
    if missing:
        raise UserError(f"config.json: {missing[0]} is missing")
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"config.json: {field + ': ' if field else ''}{first['msg']}") from error


def _check_architecture(values: Mapping[str, Any]) -> None:
    if values.get("model_type") not in ("deepseek_v3", "kimi_k2"):
        raise UserError(f"config.json: model_type is {values.get('model_type')!r}, allowed are deepseek_v3 and kimi_k2")
    heads = {"num_key_value_heads": values.get("num_attention_heads"), "rope_interleave": True}
    for name, expected in (_FIXED | heads).items():
        if values.get(name, expected) not in (expected, None):
            raise UserError(f"config.json: {name} is {values[name]!r}, allowed is {expected!r}")


def _rope_scaling(scaling: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """YaRN with the defaults of DeepSeek's reader, where 0 stands for a magnitude that is not given."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(f"config.json: rope_scaling type is {kind!r}, allowed are yarn and default")
    if scaling.get("truncate", True) is not True or scaling.get("attention_factor") is not None:
        raise UserError("config.json: rope_scaling has truncate or attention_factor, which this model does not know")
    defaults = {
        "beta_fast": 32.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "original_max_position_embeddings": values.get("max_position_embeddings"),
    }
    known = {name: scaling[name] for name in RopeScaling.model_fields if scaling.get(name) is not None}
    return defaults | known


def save(
    model: Transformer | Mapping[str, Tensor],
    config: ModelConfig,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    *,
    folder: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights in `dtype` (float32 or bfloat16) under `directory/folder`.

    `folder` is "" for a Hugging Face folder. Selection biases stay float32. `model` is a Transformer or a state dict
    with its parameter names.
    """
    state = model.state_dict() if isinstance(model, Transformer) else model
    shards = cut(logical_tensors(config), FORMATS[dtype], shard_bytes)
    target = directory / folder
    target.mkdir(parents=True, exist_ok=True)
    write_config(to_hf_config(config) | dtype_fields(FORMATS[dtype]), directory)
    write_shards(shards, lambda t: [part(state[t.parameter], t).to(stored_dtype(t, dtype))], target)


def stored_dtype(tensor: LogicalTensor, dtype: torch.dtype) -> torch.dtype:
    """Selection biases keep float32: their steps of 0.001 vanish in bfloat16."""
    return torch.float32 if tensor.group == "none" else dtype


def part(parameter: Tensor, tensor: LogicalTensor) -> Tensor:
    """The view of a parameter that a logical tensor names."""
    view: Tensor = tensor.of(parameter)
    return view


def write_config(values: Mapping[str, Any], directory: Path) -> None:
    """Write `config.json` with sorted keys."""
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def dtype_fields(form: Format) -> dict[str, str]:
    """The precision in `config.json`, under its present name and the one that readers before transformers 5 know."""
    name = "float32" if form == "fp32" else "bfloat16"
    return {"dtype": name, "torch_dtype": name}


def write_shards(shards: Sequence[Shard], encode: Callable[[LogicalTensor], Iterable[Tensor]], directory: Path) -> None:
    """Write safetensors files, and their index if there are several; `encode` gives what a logical tensor stores."""
    for shard in shards:
        write_file(directory / shard.file, shard.stored, (value for t in shard.tensors for value in encode(t)))
    write_index(shards, directory)


def write_index(shards: Sequence[Shard], directory: Path) -> None:
    """Write the index that several safetensors files need; one file needs none."""
    if len(shards) > 1:
        (directory / INDEX).write_text(json.dumps(index(shards), indent=2, sort_keys=True) + "\n")


def weights_folder(directory: Path) -> Path:
    """Where a checkpoint artifact or Hugging Face folder has its safetensors files."""
    return directory / "model" if (directory / "model").is_dir() else directory


def read_values(directory: Path) -> dict[str, Any]:
    """The content of `config.json`; raises UserError when there is none or it is not JSON."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json there")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return values


def read_config(directory: Path) -> ModelConfig:
    """ModelConfig of a checkpoint artifact or Hugging Face folder; raises UserError like `from_hf_config`."""
    return from_hf_config(read_values(directory))


def load(
    directory: Path, *, compute_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32
) -> Transformer:
    """Read a checkpoint artifact or Hugging Face folder; weights are held in `dtype`.

    Raises UserError naming any tensor that is missing, unknown, misshapen or not finite.
    """
    config = read_config(directory)
    tensors = CheckpointTensors(weights_folder(directory))
    check_stored(tensors, {t.name: (t.shape, PLAIN_TYPES) for t in logical_tensors(config)}, config)
    model = Transformer(config, compute_dtype=compute_dtype).to(dtype)
    fill(model, tensors)
    return model


def fill(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors with checkpoint names into a model; raises KeyError when one is missing."""
    state = model.state_dict()
    for tensor in logical_tensors(model.config):
        part(state[tensor.parameter], tensor).copy_(tensors[tensor.name])


def check_stored(
    tensors: CheckpointTensors,
    expected: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
    config: ModelConfig,
) -> None:
    """Compare names, shapes and types with what is expected, before any value is read.

    Raises UserError naming tensor, file, what is expected and what was found.
    """
    missing = sorted(expected.keys() - tensors.stored.keys())
    if missing:
        folder = tensors.files[0].parent
        raise UserError(f"tensor {missing[0]}: expected in {folder}, found nowhere; {len(missing)} missing in all")
    extra = sorted(tensors.stored.keys() - expected.keys() - ignored(tensors, config))
    if extra:
        file = tensors.stored[extra[0]].file
        raise UserError(f"tensor {extra[0]} in {file}: unknown to config.json's model; {len(extra)} unknown in all")
    for name, (shape, types) in expected.items():
        found = tensors.stored[name]
        if found.shape != shape:
            raise UserError(f"tensor {name} in {found.file}: expected shape {list(shape)}, found {list(found.shape)}")
        if found.dtype not in types:
            raise UserError(f"tensor {name} in {found.file}: expected type {' or '.join(types)}, found {found.dtype}")


def ignored(tensors: CheckpointTensors, config: ModelConfig) -> set[str]:
    """Tensors that the model does not use: multi-token prediction layers after the last, and stored frequencies."""
    layers = re.compile(r"model\.layers\.(\d+)\.(.*)")
    found = {name: match for name in tensors.stored if (match := layers.fullmatch(name))}
    return {
        name
        for name, match in found.items()
        if int(match[1]) >= config.num_hidden_layers or match[2] == "self_attn.rotary_emb.inv_freq"
    }
