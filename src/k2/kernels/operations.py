"""The kernels as the model calls them: what `k2.model.backend.kernels_for` hands out.

Letters in shapes: B batch, L length, T tokens, H heads, X query width, R rotary part of it, Y key content and value,
V value width, D hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2.kernels.attention import Documents, mla_attention
from k2.kernels.experts import Rows, arrange, routed_experts
from k2.kernels.fp8 import dequantize, quantize
from k2.kernels.int4 import fake_quantize
from k2.kernels.linear_cross_entropy import linear_cross_entropy
from k2.kernels.rms_norm import rms_norm
from k2.kernels.router import route
from k2.kernels.swiglu import gated, gated_backward
from k2.kernels.symmetric import newton_schulz

__all__ = [
    "Packing",
    "Rows",
    "arrange",
    "attention",
    "dequantize",
    "fake_quantize",
    "gated",
    "gated_backward",
    "newton_schulz",
    "packed",
    "quantize",
    "rms_norm",
    "routed",
    "routed_experts",
    "token_log_probs",
]


@dataclass(frozen=True)
class Packing:
    """A batch as one row of documents: padding is left out, and everything else has a document of its own.

    tokens_T: positions in the flattened batch of the real tokens; None when all are.
    """

    documents: Documents
    tokens_T: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.tokens_T is None else flat.index_select(0, self.tokens_T)

    def scatter(self, x: Tensor, batch: int, length: int) -> Tensor:
        """[T, ...] -> [B, L, ...], zeros where padding is."""
        if self.tokens_T is not None:
            x = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, self.tokens_T, x)
        return x.view(batch, length, *x.shape[1:])


def packed(tokens_BL: Tensor, documents_BL: Tensor | None, keep_BL: Tensor | None) -> Packing:
    """Rows of a batch never see each other, nor neighbours with different numbers in `documents_BL`.

    Raises nothing for a document that goes on after another one: it becomes two.
    """
    batch, length = tokens_BL.shape
    rows_T = torch.arange(batch, device=tokens_BL.device).repeat_interleave(length)
    numbers_2T = torch.stack([rows_T, rows_T if documents_BL is None else documents_BL.flatten()])
    tokens_T = None if keep_BL is None else keep_BL.flatten().nonzero()[:, 0]
    if tokens_T is not None:
        numbers_2T = numbers_2T.index_select(1, tokens_T)
    return Packing(Documents.between(numbers_2T), tokens_T)


def attention(
    q_BLHX: Tensor, q_rotary_BLHR: Tensor, kv_BLHY: Tensor, k_rotary_BLR: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention output [B, L, H, V] and every head's largest logit; of `q_BLHX` the content part only is read."""
    q, q_rotary, kv, k_rotary = (packing.gather(x) for x in (q_BLHX, q_rotary_BLHR, kv_BLHY, k_rotary_BLR))
    content = q.shape[-1] - q_rotary.shape[-1]
    output_THV, max_H = mla_attention(
        q[..., :content], q_rotary, kv[..., :content], k_rotary, kv[..., content:], packing.documents, scale
    )
    return packing.scatter(output_THV, *q_BLHX.shape[:2]), max_H


def routed(logits_TE: Tensor, bias_E: Tensor, choices: int, scaling: float) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """Chosen experts, their weights, all scores, and where the pairs of a token and an expert go."""
    chosen = route(logits_TE, bias_E, choices, scaling)
    rows = Rows(chosen.slots_TS, chosen.source_N, chosen.source_N // choices, chosen.offsets_E)
    return chosen.experts_TS.long(), chosen.weights_TS, logits_TE.sigmoid(), rows


def token_log_probs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Natural-log probability [T] of each target."""
    return -linear_cross_entropy(hidden_TD.contiguous(), weight_VD, targets_T)
