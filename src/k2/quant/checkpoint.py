"""Hugging Face folders in bfloat16 and in compressed-tensors' `pack-quantized` INT4, written and read.

Tensors pass through memory one at a time (and one shard at a time to be written). The layout of logical tensors says
what is quantised: the routed experts and nothing else.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2.config.model import ModelConfig
from k2.model.hf import (
    CheckpointTensors,
    fill,
    part,
    read_config,
    stored_dtype,
    to_hf_config,
    write_config,
    write_shards,
)
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.transformer import Transformer
from k2.quant.int4 import dequantize, pack, quantize, unpack

IGNORE = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*mlp\.gate$",
)
"""Modules a reader must leave alone: Kimi K2 Thinking's list, and the router, which some readers take for a Linear."""


def quantization_config(group_size: int) -> dict[str, Any]:
    """The `quantization_config` of `config.json`, as Kimi K2 Thinking has it."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(IGNORE),
        "config_groups": {"group_0": group},
    }


def write_bf16(tensors: Mapping[str, Tensor], config: ModelConfig, directory: Path, shard_bytes: int) -> None:
    """Write `config.json` and the weights in bfloat16 (selection biases in float32)."""
    layout = logical_tensors(config)
    named = ((t.name, tensors[t.name].to(stored_dtype(t, torch.bfloat16))) for t in layout)
    sizes = [t.size * stored_dtype(t, torch.bfloat16).itemsize for t in layout]
    _write(named, sizes, to_hf_config(config), directory, shard_bytes)


def write_int4(
    tensors: Mapping[str, Tensor], config: ModelConfig, directory: Path, shard_bytes: int, group_size: int
) -> None:
    """Write `config.json` and the weights, the routed experts packed and the rest as `write_bf16` does."""
    layout = logical_tensors(config)
    named = (pair for t in layout for pair in _stored(t, tensors[t.name], group_size))
    sizes = [size for t in layout for size in _stored_bytes(t, group_size)]
    extra = {"quantization_config": quantization_config(group_size)}
    _write(named, sizes, to_hf_config(config) | extra, directory, shard_bytes)


def bits_per_weight(config: ModelConfig, group_size: int) -> tuple[float, float]:
    """Bits a weight takes in the INT4 folder: of the routed experts, and of the whole model."""
    layout = logical_tensors(config)
    routed = [t for t in layout if t.quantized]

    def bits(tensors: list[LogicalTensor]) -> float:
        return 8 * sum(sum(_stored_bytes(t, group_size)) for t in tensors) / sum(t.size for t in tensors)

    return bits(routed), bits(layout)


class Int4Tensors(Mapping[str, Tensor]):
    """A folder's tensors under their plain names, packed ones dequantised (bfloat16) when asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError as `CheckpointTensors` does."""
        self._stored = CheckpointTensors(directory)
        self._names = sorted({_plain_name(name) for name in self._stored})

    def __getitem__(self, name: str) -> Tensor:
        if name in self._stored:
            return self._stored[name]
        return dequantize(unpack(self._stored[f"{name}_packed"]), self._stored[f"{name}_scale"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@torch.no_grad()
def as_exported(model: Transformer, group_size: int | None) -> Transformer:
    """A copy with the weights that an export stores: bfloat16, the routed experts INT4 if there is a group size."""
    state = model.state_dict()
    copy = Transformer(model.config, compute_dtype=model.compute_dtype)
    fill(copy, {t.name: _rounded(t, part(state[t.parameter], t), group_size) for t in logical_tensors(model.config)})
    return copy


def load_int4(directory: Path, *, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """Read an INT4 folder into a Transformer that holds the dequantised weights.

    Raises UserError naming any tensor that is missing, unknown, misshapen or not finite.
    """
    model = Transformer(read_config(directory), compute_dtype=compute_dtype)
    fill(model, Int4Tensors(directory))
    return model


def _write(
    named: Iterator[tuple[str, Tensor]], sizes: list[int], config: dict[str, Any], directory: Path, shard_bytes: int
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_config(config | {"dtype": "bfloat16"}, directory)
    write_shards(named, sizes, directory, shard_bytes)


def _rounded(tensor: LogicalTensor, value: Tensor, group_size: int | None) -> Tensor:
    if tensor.quantized and group_size is not None:
        return dequantize(*quantize(value, group_size))
    return value.to(stored_dtype(tensor, torch.bfloat16))


def _stored(tensor: LogicalTensor, value: Tensor, group_size: int) -> Iterator[tuple[str, Tensor]]:
    """What the INT4 folder holds for a logical tensor; `_stored_bytes` gives the sizes."""
    if not tensor.quantized:
        yield tensor.name, value.to(stored_dtype(tensor, torch.bfloat16))
        return
    values, scale = quantize(value, group_size)
    yield f"{tensor.name}_packed", pack(values)
    yield f"{tensor.name}_scale", scale
    yield f"{tensor.name}_shape", torch.tensor(tensor.shape, dtype=torch.int32)


def _stored_bytes(tensor: LogicalTensor, group_size: int) -> list[int]:
    if not tensor.quantized:
        return [tensor.size * stored_dtype(tensor, torch.bfloat16).itemsize]
    return [tensor.size // 2, tensor.size // group_size * torch.bfloat16.itemsize, 2 * torch.int32.itemsize]


def _plain_name(name: str) -> str:
    return name.removesuffix("_packed").removesuffix("_scale").removesuffix("_shape")
