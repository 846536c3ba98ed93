"""Batched decoding of a small Llama on CPU: fused projections, one preallocated cache, grouped-query attention.

The weights and the mathematics are those of transformers' LlamaForCausalLM; at batch 48 its cache concatenation
and repeated keys cost several times the matrix products, which is why this loop exists.
Shapes: B batch, L length, D hidden, H heads, G key-value heads, C head width, S cache slots, V vocabulary, N layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of a Llama checkpoint that its tensors do not tell, under Hugging Face's names."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int


class Llama:
    """A Llama with tied embeddings; holds weights and no state between calls."""

    def __init__(self, shape: LlamaShape, tensors: Mapping[str, Tensor]) -> None:
        """Take `tensors` under Hugging Face names and fuse what is multiplied with the same input."""
        self.shape = shape
        self.embed_VD = tensors["model.embed_tokens.weight"]
        self.norm_D = tensors["model.norm.weight"]
        self.layers = [_fuse(tensors, f"model.layers.{n}.") for n in range(shape.num_hidden_layers)]
        self.head_width = self.embed_VD.shape[1] // shape.num_attention_heads

    def new_cache(self, rows: int, slots: int) -> Tensor:
        """An empty key-value cache, (N, 2, B, G, S, C)."""
        shape = (len(self.layers), 2, rows, self.shape.num_key_value_heads, slots, self.head_width)
        return torch.zeros(shape, dtype=self.embed_VD.dtype)

    def forward(self, ids_BL: Tensor, cache: Tensor, slot: int, pad_B: Tensor) -> Tensor:
        """Logits (B, V) of the token that follows `ids_BL`, whose keys go to cache slots from `slot` on.

        Rows are padded on the left: the first `pad_B` slots of each row are never attended to.
        """
        length = ids_BL.shape[1]
        slots_L = torch.arange(slot, slot + length)
        rotary = self._rotary((slots_L[None] - pad_B[:, None]).clamp_min(0))
        seen_S = torch.arange(slot + length)
        visible = (seen_S[None, None] <= slots_L[None, :, None]) & (seen_S[None, None] >= pad_B[:, None, None])
        # A padded query sees nothing; letting it see itself keeps its softmax finite.
        visible = (visible | (seen_S[None, None] == slots_L[None, :, None]))[:, None]
        hidden_BLD = F.embedding(ids_BL, self.embed_VD)
        for layer, kv in zip(self.layers, cache, strict=True):
            hidden_BLD = self._layer(layer, hidden_BLD, kv, slot, rotary, visible)
        last_BD = self._norm(hidden_BLD[:, -1], self.norm_D)
        return F.linear(last_BD, self.embed_VD).float()

    def _layer(
        self, layer: "_Layer", x_BLD: Tensor, kv: Tensor, slot: int, rotary: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        rows, length, _ = x_BLD.shape
        heads, groups = self.shape.num_attention_heads, self.shape.num_key_value_heads
        fused = F.linear(self._norm(x_BLD, layer.input_norm_D), layer.qkv)
        fused = fused.view(rows, length, heads + 2 * groups, self.head_width).transpose(1, 2)
        rotated = _rotate(fused[:, : heads + groups], rotary)
        kv[0, :, :, slot : slot + length] = rotated[:, heads:]
        kv[1, :, :, slot : slot + length] = fused[:, heads + groups :]
        seen = kv[..., : slot + length, :]
        mixed = _attend(rotated[:, :heads], seen[0], seen[1], visible)
        x_BLD = x_BLD + F.linear(mixed.transpose(1, 2).reshape(rows, length, -1), layer.out)
        gate, up = F.linear(self._norm(x_BLD, layer.mlp_norm_D), layer.gate_up).chunk(2, dim=-1)
        return x_BLD + F.linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(x, weight_D.shape, weight_D, self.shape.rms_norm_eps)

    def _rotary(self, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        frequency = self.shape.rope_theta ** (-torch.arange(0, self.head_width, 2) / self.head_width)
        angle = (positions_BL[..., None] * frequency).repeat(1, 1, 2)[:, None]
        return angle.cos().to(self.embed_VD.dtype), angle.sin().to(self.embed_VD.dtype)


@dataclass(frozen=True)
class _Layer:
    input_norm_D: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm_D: Tensor
    gate_up: Tensor
    down: Tensor


def _fuse(tensors: Mapping[str, Tensor], prefix: str) -> _Layer:
    attention = [tensors[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
    mlp = [tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    return _Layer(
        tensors[f"{prefix}input_layernorm.weight"],
        torch.cat(attention),
        tensors[f"{prefix}self_attn.o_proj.weight"],
        tensors[f"{prefix}post_attention_layernorm.weight"],
        torch.cat(mlp),
        tensors[f"{prefix}mlp.down_proj.weight"],
    )


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]


def _attend(q_BHLC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, visible: Tensor) -> Tensor:
    """Grouped-query attention; one query position folds the heads of a group into rows, so keys are read once."""
    if q_BHLC.shape[2] > 1:
        return F.scaled_dot_product_attention(q_BHLC, k_BGSC, v_BGSC, attn_mask=visible, enable_gqa=True)
    rows, groups = k_BGSC.shape[:2]
    q = q_BHLC.reshape(rows, groups, -1, q_BHLC.shape[-1])
    mixed = F.scaled_dot_product_attention(q, k_BGSC, v_BGSC, attn_mask=visible)
    return mixed.reshape(q_BHLC.shape)
