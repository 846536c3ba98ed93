"""The routed experts in compressed-tensors' `pack-quantized` INT4: how `config.json` says so, sizes, exact weights.

The layout of logical tensors says what is quantised: the routed experts and nothing else.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2.config.model import ModelConfig
from k2.interop.source import LogicalTensors
from k2.model.hf import fill, part, stored_dtype
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.storage import weight_bytes
from k2.model.transformer import Transformer
from k2.quant.int4 import dequantize, quantize

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


def bits_per_weight(config: ModelConfig, group_size: int) -> tuple[float, float]:
    """Bits a weight takes in the INT4 folder: of the routed experts, and of the whole model."""
    layout = logical_tensors(config)

    def bits(tensors: list[LogicalTensor]) -> float:
        return 8 * weight_bytes(tensors, "int4", group_size) / sum(t.size for t in tensors)

    return bits([t for t in layout if t.quantized]), bits(layout)


@torch.no_grad()
def as_exported(model: Transformer, group_size: int | None) -> Transformer:
    """A copy with the weights that an export stores: bfloat16, the routed experts INT4 if there is a group size."""
    state = model.state_dict()
    copy = Transformer(model.config, compute_dtype=model.compute_dtype)
    fill(copy, {t.name: _rounded(t, part(state[t.parameter], t), group_size) for t in logical_tensors(model.config)})
    return copy


def load_int4(directory: Path, *, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """Read a folder in INT4 (or FP8, or no quantisation) into a Transformer that holds the dequantised weights.

    Raises UserError naming any tensor that is missing, unknown, misshapen or not finite.
    """
    tensors = LogicalTensors(directory)
    model = Transformer(tensors.config, compute_dtype=compute_dtype)
    fill(model, tensors)
    return model


def _rounded(tensor: LogicalTensor, value: Tensor, group_size: int | None) -> Tensor:
    if tensor.quantized and group_size is not None:
        return dequantize(*quantize(value, group_size))
    return value.to(stored_dtype(tensor, torch.bfloat16))
