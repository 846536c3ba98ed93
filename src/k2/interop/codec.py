"""Logical tensors to what a format stores, and back.

Letters in shapes: O rows (output), I columns (input).
"""

import torch
from torch import Tensor

from k2.model.hf import stored_dtype
from k2.model.layout import LogicalTensor
from k2.model.storage import INT4_GROUP, Format
from k2.quant.int4 import pack, quantize


def encode(tensor: LogicalTensor, value: Tensor, form: Format, group_size: int = INT4_GROUP) -> list[Tensor]:
    """What `k2.model.storage.stored` lists for a logical tensor, in its order. FP8 is read, never written."""
    if form == "int4" and tensor.quantized:
        values, scale = quantize(value, group_size)
        return [pack(values), scale, torch.tensor(tensor.shape, dtype=torch.int32)]
    return [value.to(stored_dtype(tensor, torch.float32 if form == "fp32" else torch.bfloat16))]


def decode_fp8(weight_OI: Tensor, factors: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 [O, I] of an e4m3 weight and the factor of each block (DeepSeek-V3's `weight_scale_inv`).

    The last block of a row or column may be incomplete.
    """
    result = weight_OI.to(torch.float32)
    for number, row_factors in enumerate(factors.to(torch.float32)):
        rows = result[number * block[0] : (number + 1) * block[0]]
        rows.mul_(row_factors.repeat_interleave(block[1])[: rows.shape[1]])
    return result
