"""The latent cache: what decoding needs of past tokens, K + R values per token and layer.

Letters in shapes: N layers, S cache rows, L slots of a row, K latent rank, R rotary, C = K + R, B batch.
"""

from math import prod

import torch
from torch import Tensor

from k2.config.model import ModelConfig
from k2.kernels.cpu.decode import SLACK
from k2.model.layout import cache_values_per_token


class LatentCache:
    """`rows` sequences of up to `length` tokens, allocated once. Row s holds its tokens in slots 0, 1, ..."""

    def __init__(self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, rows, length, cache_values_per_token(config))
        memory = torch.zeros(prod(shape) + SLACK, dtype=dtype, device=device)
        self.values_NSLC = memory[: prod(shape)].view(shape)
        self.dtype = dtype
        self._layers = [(values_SLC, values_SLC.flatten(0, 1)) for values_SLC in self.values_NSLC]
        self._starts_S = torch.arange(rows, device=device) * length

    def fill(self, layer: int, rows: Tensor, latents_BLC: Tensor) -> None:
        """Store whole prompts: `latents_BLC[b]` becomes the first slots of row `rows[b]`."""
        self._layers[layer][0][rows, : latents_BLC.shape[1]] = latents_BLC

    def places(self, slots_B: Tensor) -> Tensor:
        """Where `append` writes: slot `slots_B[b]` of row b."""
        return self._starts_S[: len(slots_B)] + slots_B

    def append(self, layer: int, places_B: Tensor, latents_BC: Tensor) -> Tensor:
        """Store one token per row; the layer's first rows [B, L, C], this token included."""
        values_SLC, flat = self._layers[layer]
        flat.index_copy_(0, places_B, latents_BC.to(self.dtype))
        present: Tensor = values_SLC[: len(places_B)]
        return present

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` slots of rows `source` to rows `target`, in all layers."""
        self.values_NSLC[:, target, :length] = self.values_NSLC[:, source, :length]
