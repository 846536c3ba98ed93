"""FP8 tiles in torch: what runs where there is no GPU, and needs no Triton.

Letters in shapes: N rows, D width, G tiles per row.
"""

import torch
from torch import Tensor

WIDTH = 128
LARGEST = 448.0


def quantize(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """`k2.kernels.fp8.quantize` in torch."""
    N, D = x_ND.shape
    tiles = torch.nn.functional.pad(x_ND.float(), (0, -D % WIDTH)).view(N, -(-D // WIDTH), WIDTH)
    top = tiles.abs().amax(-1)
    scale_NG = torch.where(top == 0, 1.0, top / LARGEST)
    codes = (tiles / scale_NG[..., None]).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :D].contiguous(), scale_NG


def dequantize(code_ND: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """`k2.kernels.fp8.dequantize` in torch."""
    return (code_ND.float() * scale_NG.repeat_interleave(WIDTH, dim=1)[:, : code_ND.shape[1]]).to(dtype)
