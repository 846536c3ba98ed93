"""Group-wise symmetric INT4 as compressed-tensors' `pack-quantized` format defines it.

A group of consecutive weights along the input shares one bfloat16 scale = max|w| / 7.5, and a weight is stored as
q = clamp(round(w / scale), -8, 7). Eight values make one int32: q + 8 in four bits, the first value lowest.
The dequantised weight is the bfloat16 product q * scale, which is what a reader of the bfloat16 scale computes.

Letters in shapes: O rows (output), I columns (input), G groups per row.
"""

import torch
from torch import Tensor

HALF_RANGE = 7.5
"""Half of the distance between the lowest and the highest value, -8 and 7."""

ZERO_SCALE = torch.finfo(torch.bfloat16).eps
"""Scale of a group of zeros; any positive number would do, this is compressed-tensors' choice."""


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Values int8 [..., O, I] in [-8, 7] and scales bfloat16 [..., O, G] of a weight [..., O, I].

    Computes in float32 whatever the weight's type, so that a bfloat16 copy held as float32 gives the same bytes.
    `group_size` must divide I.
    """
    groups = weight.float().reshape(*weight.shape[:-1], -1, group_size)
    scale = (groups.abs().amax(-1) / HALF_RANGE).to(torch.bfloat16)
    scale = torch.where(scale == 0, ZERO_SCALE, scale)
    values = groups.div(scale.float()[..., None]).round_().clamp_(-8, 7)
    return values.to(torch.int8).flatten(-2), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 weight [..., O, I] of int8 values [..., O, I] and bfloat16 scales [..., O, G]."""
    groups = values.reshape(*scale.shape, -1)
    return groups.to(scale.dtype).mul_(scale[..., None]).flatten(-2)


def pack(values: Tensor) -> Tensor:
    """int32 [..., O, I / 8] of int8 values [..., O, I] in [-8, 7]; I must be a multiple of 8."""
    # Two values are one 16-bit word: its low nibbles are joined in its low byte. XOR with 8 adds 8 to a nibble.
    words = values.contiguous().view(torch.int16).bitwise_and(0x0F0F)
    words.bitwise_or_(words >> 4)
    return words.to(torch.uint8).bitwise_xor_(0x88).view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int8 values [..., O, I] of int32 [..., O, I / 8]; the inverse of `pack`."""
    words = packed.contiguous().view(torch.uint8).to(torch.int16)
    words.bitwise_or_(words << 4).bitwise_and_(0x0F0F)
    return words.view(torch.int8).sub_(8)
