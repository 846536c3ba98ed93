"""Rotary positions with YaRN context extension (arXiv 2309.00071), as DeepSeek-V3 and Kimi K2 configure them.

Checkpoints hold rotary dimensions as interleaved pairs (0, 1), (2, 3), ...; rotated vectors come out as
all first members, then all second members. Queries and keys share that order, so products do not see it.

Letters in shapes: B batch, L length, R rotary dimensions.
"""

from math import ceil, floor, log, pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.config.model import ModelConfig, RopeScaling
from k2.kernels import cpu
from k2.model.backend import runs_in_c
from k2.model.layers import upcast


def _magnitude(factor: float, weight: float) -> float:
    """YaRN's `0.1 * weight * ln(factor) + 1`."""
    return 0.1 * weight * log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What attention logits are multiplied with: qk_head_dim^-0.5, times YaRN's squared magnitude."""
    scale = 1.0 / sqrt(config.qk_head_dim)
    if config.rope_scaling is None:
        return scale
    return scale * _magnitude(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Radians per position of each rotary pair, `qk_rope_head_dim / 2` of them."""
    width = config.qk_rope_head_dim
    plain = [config.rope_theta ** (-i / width) for i in range(0, width, 2)]
    if config.rope_scaling is None:
        return plain
    low, high = _ramp(config.rope_scaling, width, config.rope_theta)
    kept = [1.0 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
    return [f * keep + f / config.rope_scaling.factor * (1.0 - keep) for f, keep in zip(plain, kept, strict=True)]


def _ramp(scaling: RopeScaling, width: int, theta: float) -> tuple[float, float]:
    """First and last pair between which frequencies pass from kept to divided (YaRN, equation 23)."""

    def pair(rotations: float) -> float:
        return width * log(scaling.original_max_position_embeddings / (rotations * 2 * pi)) / (2 * log(theta))

    low = max(floor(pair(scaling.beta_fast)), 0)
    high = min(ceil(pair(scaling.beta_slow)), width - 1)
    return low, high if high != low else high + 0.001


def rotary_tables(config: ModelConfig, positions_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, L, R/2] of every position's angles, computed in float64."""
    frequencies_R = torch.tensor(inverse_frequencies(config), dtype=torch.float64, device=positions_BL.device)
    angles_BLR = positions_BL.to(torch.float64)[..., None] * frequencies_R
    size = _table_magnitude(config.rope_scaling)
    return (angles_BLR.cos() * size).to(dtype), (angles_BLR.sin() * size).to(dtype)


def _table_magnitude(scaling: RopeScaling | None) -> float:
    if scaling is None:
        return 1.0
    if not (scaling.mscale and scaling.mscale_all_dim):
        return _magnitude(scaling.factor, 1.0)
    return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved pairs of the last axis as complex numbers times `turn`: first members, then second ones."""
    wide = upcast(x)
    pairs = torch.complex(wide[..., 0::2], wide[..., 1::2])
    return torch.view_as_real(pairs.mul_(turn)).mT.flatten(-2)


def turned_back(grad: Tensor, turn: Tensor) -> Tensor:
    """Gradient by the input of `turned` from the one by its output."""
    pairs = torch.complex(*upcast(grad).chunk(2, dim=-1))
    return torch.view_as_real(pairs.mul_(turn.conj())).flatten(-2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return cpu.turned(x, turn) if runs_in_c(x) else turned(x, turn).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return cpu.turned_back(grad, turn) if runs_in_c(grad) else turned_back(grad, turn).to(grad.dtype), None


def rotations(config: ModelConfig, positions_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Every position's rotation as complex numbers [B, L, R/2] in at least float32, of tables rounded to `dtype`."""
    return torch.complex(*(upcast(table) for table in rotary_tables(config, positions_BL, dtype)))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate interleaved pairs of the last axis; `turn` broadcasts against half of it."""
    result: Tensor = _Rotate.apply(x, turn)  # type: ignore[no-untyped-call]
    return result
