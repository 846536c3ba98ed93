"""The latent cache: what decoding needs of past tokens, K + R values per token and layer.

Letters in shapes: N layers, S cache rows, L slots of a row, K latent rank, R rotary, B batch.
"""

import torch
from torch import Tensor

from k2.config.model import ModelConfig
from k2.model.layout import cache_values_per_token


class LatentCache:
    """`rows` sequences of up to `length` tokens, allocated once. Row s holds its tokens in slots 0, 1, ..."""

    def __init__(self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, rows, length, cache_values_per_token(config))
        self.values_NSLC = torch.zeros(shape, dtype=dtype, device=device)

    def fill(self, layer: int, rows: Tensor, latents_BLC: Tensor) -> None:
        """Store whole prompts: `latents_BLC[b]` becomes the first slots of row `rows[b]`."""
        self.values_NSLC[layer, rows, : latents_BLC.shape[1]] = latents_BLC

    def append(self, layer: int, slots_B: Tensor, latents_BC: Tensor) -> None:
        """Store one token in slot `slots_B[b]` of row b."""
        rows = self.values_NSLC[layer, : len(slots_B)]
        index = slots_B[:, None, None].expand(-1, 1, rows.shape[-1])
        rows.scatter_(1, index, latents_BC[:, None])

    def read(self, layer: int, rows: int, length: int) -> Tensor:
        """View [rows, length, K + R] of the first rows and slots."""
        return self.values_NSLC[layer, :rows, :length]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` slots of rows `source` to rows `target`, in all layers."""
        self.values_NSLC[:, target, :length] = self.values_NSLC[:, source, :length]
