"""Checkpoints in Hugging Face's form: DeepseekV3 `config.json` and safetensors with one tensor per expert matrix.

A checkpoint artifact holds `config.json` and its weights under `model/`; a Hugging Face folder holds both side by
side. `load` reads either. Tensors pass through memory one shard (writing) or one tensor (reading) at a time, and
the same weights always give the same bytes.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from k2.config.model import ModelConfig, RopeScaling
from k2.errors import UserError
from k2.model.layout import LogicalTensor, logical_tensors, routed_scaling
from k2.model.transformer import Transformer

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
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
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a DeepseekV3-shaped `config.json`; raises UserError for another architecture."""
    if values.get("model_type") not in ("deepseek_v3", "kimi_k2"):
        raise UserError(f"config.json: model_type is {values.get('model_type')!r}, allowed are deepseek_v3 and kimi_k2")
    rope = values.get("rope_parameters") or {}
    fields = {name: values[name] for name in _SAME_NAME if name in values}
    fields["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    fields["routed_scaling_factor"] = values.get("routed_scaling_factor")
    scaling = values.get("rope_scaling") or rope
    if scaling.get("type", scaling.get("rope_type", "default")) == "yarn":
        known = {name: scaling[name] for name in RopeScaling.model_fields if name in scaling}
        fields["rope_scaling"] = RopeScaling(**({"beta_fast": 32.0, "mscale_all_dim": 0.0} | known))
    return ModelConfig(**fields)


def save(
    model: Transformer | Mapping[str, Tensor],
    config: ModelConfig,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    *,
    folder: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights in `dtype` under `directory/folder` ("" for a Hugging Face folder).

    Selection biases stay float32. `model` is a Transformer or a state dict with its parameter names.
    """
    state = model.state_dict() if isinstance(model, Transformer) else model
    target = directory / folder
    target.mkdir(parents=True, exist_ok=True)
    write_config(to_hf_config(config) | {"dtype": str(dtype).removeprefix("torch.")}, directory)
    tensors = ((t, part(state[t.parameter], t).detach().to(stored_dtype(t, dtype))) for t in logical_tensors(config))
    sizes = [t.size * stored_dtype(t, dtype).itemsize for t in logical_tensors(config)]
    write_shards(((t.name, value) for t, value in tensors), sizes, target, shard_bytes)


def stored_dtype(tensor: LogicalTensor, dtype: torch.dtype) -> torch.dtype:
    """Selection biases keep float32: their steps of 0.001 vanish in bfloat16."""
    return torch.float32 if tensor.group == "none" else dtype


def part(parameter: Tensor, tensor: LogicalTensor) -> Tensor:
    """The view of a parameter that a logical tensor names."""
    piece = parameter if tensor.index is None else parameter[tensor.index]
    return piece if tensor.rows is None else piece[tensor.rows]


def write_config(values: Mapping[str, Any], directory: Path) -> None:
    """Write `config.json` with sorted keys."""
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def write_shards(
    tensors: Iterator[tuple[str, Tensor]], sizes: list[int], directory: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write named tensors, whose byte sizes are `sizes`, as one safetensors file or as shards with an index."""
    shards: list[int] = [0]
    room = shard_bytes
    for size in sizes:
        if size > room and shards[-1]:
            shards.append(0)
            room = shard_bytes
        shards[-1] += 1
        room -= size
    weight_map: dict[str, str] = {}
    for number, count in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: value.contiguous().clone() for _, (name, value) in zip(range(count), tensors, strict=False)}
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class CheckpointTensors(Mapping[str, Tensor]):
    """Tensors of a folder of safetensors files by name, each read when asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError when there are no weights, or a file is truncated or not safetensors."""
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory}: no .safetensors file there")
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{file}: not a complete safetensors file ({error})") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)


def read_config(directory: Path) -> ModelConfig:
    """ModelConfig of a checkpoint artifact or Hugging Face folder."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json there")
    return from_hf_config(json.loads(path.read_text()))


def load(
    directory: Path, *, compute_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32
) -> Transformer:
    """Read a checkpoint artifact or Hugging Face folder; weights are held in `dtype`.

    Raises UserError naming any tensor that is missing, unknown, misshapen or not finite.
    """
    model = Transformer(read_config(directory), compute_dtype=compute_dtype).to(dtype)
    weights = directory / "model"
    fill(model, CheckpointTensors(weights if weights.is_dir() else directory))
    return model


def fill(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors with checkpoint names into a model; raises UserError like `load`."""
    layout = logical_tensors(model.config)
    _check_names({tensor.name for tensor in layout}, set(tensors), model.config.num_hidden_layers)
    state = model.state_dict()
    for tensor in layout:
        value = tensors[tensor.name]
        if tuple(value.shape) != tensor.shape:
            raise UserError(
                f"tensor {tensor.name}: shape is {list(value.shape)}, config.json says {list(tensor.shape)}"
            )
        if not value.isfinite().all():
            raise UserError(f"tensor {tensor.name}: holds NaN or infinity")
        part(state[tensor.parameter], tensor).copy_(value)


def _check_names(wanted: set[str], found: set[str], layers: int) -> None:
    missing = sorted(wanted - found)
    if missing:
        raise UserError(f"checkpoint: {len(missing)} tensors are missing, the first is {missing[0]}")
    extra = sorted(name for name in found - wanted if not _is_prediction_layer(name, layers))
    if extra:
        raise UserError(f"checkpoint: {len(extra)} tensors are unknown, the first is {extra[0]}")


def _is_prediction_layer(name: str, layers: int) -> bool:
    """Whether a tensor belongs to DeepSeek-V3's multi-token prediction, stored as layers after the last."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= layers
