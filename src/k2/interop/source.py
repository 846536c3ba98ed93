"""A folder's weights under their logical names, whatever they are stored as: float, FP8 in blocks, packed INT4.

Everything that headers tell is checked before a value is read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from k2.config.model import ModelConfig
from k2.errors import UserError
from k2.interop.codec import decode_fp8
from k2.model.hf import PLAIN_TYPES, check_stored, from_hf_config, ignored, read_values, weights_folder
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.storage import PACKED_VALUES, StoredTensor, fp8_parts, int4_parts
from k2.model.tensor_files import CheckpointTensors
from k2.quant.int4 import dequantize, unpack


class LogicalTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint artifact or Hugging Face folder by logical name, each read and dequantised when asked.

    Plain tensors keep their type, FP8 gives float32 and INT4 the type of its scales.
    """

    def __init__(self, directory: Path) -> None:
        """Raises UserError naming what is missing, unknown, misshapen, of another type or format, or truncated."""
        self.directory = directory
        self.hf_config = read_values(directory)
        self.config: ModelConfig = from_hf_config(self.hf_config)
        self.files = CheckpointTensors(weights_folder(directory))
        self.ignored = len(ignored(self.files, self.config))
        self._block, self._group = _block_and_group(self.hf_config.get("quantization_config") or {})
        self._layout = {tensor.name: tensor for tensor in logical_tensors(self.config)}
        parts = [part for tensor in self._layout.values() for part in self._parts(tensor)]
        check_stored(self.files, {part.name: (part.shape, _types(part)) for part in parts}, self.config)

    def _parts(self, tensor: LogicalTensor) -> tuple[StoredTensor, ...]:
        if self._group and f"{tensor.name}_packed" in self.files.stored:
            if tensor.shape[1] % self._group:
                raise UserError(
                    f"config.json: quantization_config's group_size ({self._group}) does not divide the"
                    f" {tensor.shape[1]} columns of {tensor.name}"
                )
            return int4_parts(tensor.name, tensor.shape, self._group)
        if self._block and f"{tensor.name}_scale_inv" in self.files.stored:
            return fp8_parts(tensor.name, tensor.shape, self._block)
        return (StoredTensor(tensor.name, "", tensor.shape),)

    def __getitem__(self, name: str) -> Tensor:
        """Raises UserError when a stored value is not finite."""
        if f"{name}_packed" in self.files.stored:
            self._check_shape(self._layout[name])
            return dequantize(unpack(self.files[f"{name}_packed"]), self.files[f"{name}_scale"])
        if f"{name}_scale_inv" in self.files.stored:
            assert self._block is not None
            return decode_fp8(self.files[name], self.files[f"{name}_scale_inv"], self._block)
        return self.files[name]

    def _check_shape(self, tensor: LogicalTensor) -> None:
        part = f"{tensor.name}_shape"
        found = self.files[part].tolist()
        if found != list(tensor.shape):
            file = self.files.stored[part].file
            raise UserError(f"tensor {part} in {file}: expected the values {list(tensor.shape)}, found {found}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def _types(part: StoredTensor) -> tuple[str, ...]:
    """Types that a stored tensor may have; writers differ in those of scales and shapes."""
    if part.name.endswith("_shape"):
        return ("I32", "I64")
    if part.name.endswith("_packed") or part.dtype == "F8_E4M3":
        return (part.dtype,)
    return PLAIN_TYPES


def _block_and_group(quantization: Mapping[str, Any]) -> tuple[tuple[int, int] | None, int | None]:
    """FP8's block and INT4's group size as `quantization_config` gives them, None for what is not used."""
    method = quantization.get("quant_method")
    if method is None:
        return None, None
    if method == "fp8":
        _require({"fmt": "e4m3"}, {"fmt": "e4m3", **quantization})
        block = quantization.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and min(block) >= 1):
            raise UserError(f"config.json: quantization_config.weight_block_size is {block!r}, e.g. [128, 128]")
        return (block[0], block[1]), None
    _require({"quant_method": "compressed-tensors", "format": "pack-quantized"}, quantization)
    groups = list((quantization.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise UserError(f"config.json: quantization_config: expected one of config_groups, found {len(groups)}")
    weights = groups[0].get("weights") or {}
    _require({"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}, weights)
    group_size = weights.get("group_size")
    if not isinstance(group_size, int) or group_size < 1 or group_size % PACKED_VALUES:
        raise UserError(f"config.json: group_size is {group_size!r}, allowed are multiples of {PACKED_VALUES}")
    return None, group_size


def _require(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(f"config.json: quantization_config: {name} is {found.get(name)!r}, allowed is {value!r}")
