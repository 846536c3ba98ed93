"""Token batches and the next-token loss that pretraining, fine-tuning and quantisation-aware training share.

Letters in shapes: B batch, L length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2.data.loader import IGNORE
from k2.model.transformer import Transformer
from k2.training.loop import Loss


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of rows.

    tokens_BL: inputs.
    targets_BL: the token after each input, IGNORE where there is no loss.
    documents_BL: number of the document within the row that a token may attend to; None is plain causal attention.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    documents_BL: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return self.tokens_BL.numel()


def micro_batches(
    tokens_BL: NDArray[np.int64],
    targets_BL: NDArray[np.int64],
    rows: int,
    documents_BL: NDArray[np.int64] | None = None,
) -> list[TokenBatch]:
    """Cut one step's rows into micro-batches of `rows` rows (the last may be shorter)."""
    parts = range(0, len(tokens_BL), rows)

    def cut(array: NDArray[np.int64], start: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[start : start + rows]))

    documents = [None if documents_BL is None else cut(documents_BL, start) for start in parts]
    return [
        TokenBatch(cut(tokens_BL, start), cut(targets_BL, start), document)
        for start, document in zip(parts, documents, strict=True)
    ]


@dataclass(frozen=True)
class NextTokenLoss:
    """Cross-entropy in nats over targets that are not IGNORE, plus DeepSeek-V3's sequence-wise balance loss.

    In two parts, because the layers may be divided: each slice has its share of the balance loss, the last one the
    cross-entropy.

    balance_weight: the balance loss's alpha (DeepSeek-V3: 1e-4); 0 leaves it out.
    """

    balance_weight: float = 0.0

    def __call__(self, model: Transformer, batch: TokenBatch) -> Loss:
        """The summed loss of one micro-batch of a model that has all layers."""
        hidden_BLD, riding = self.through(model, batch)
        return self.at_head(model, hidden_BLD, batch.targets_BL, riding)

    def through(self, model: Transformer, batch: TokenBatch) -> tuple[Tensor, Loss]:
        """Hidden states [B, L, D] after some of the layers, and these layers' share of the balance loss.

        For all but the first slice `batch.tokens_BL` are the hidden states that come in.
        """
        hidden_BLD, statistics = model(
            batch.tokens_BL, documents_BL=batch.documents_BL, with_balance_loss=self.balance_weight > 0
        )
        share = len(statistics.expert_counts_ME) / max(1, model.config.mixture_layers)
        balance = statistics.balance_loss * (int((batch.targets_BL != IGNORE).sum()) * share)
        metrics = {"cross_entropy": 0.0, "balance_loss": balance.item()}
        return hidden_BLD, Loss(self.balance_weight * balance, 0, statistics, metrics)

    def at_head(self, model: Transformer, hidden_BLD: Tensor, targets_BL: Tensor, riding: Loss) -> Loss:
        """The cross-entropy by the last layer's hidden states, added to what `through` returned with them."""
        counted_BL = targets_BL != IGNORE
        log_probs_BL = model.log_probs(hidden_BLD, targets_BL.clamp(min=0))
        cross_entropy = -torch.where(counted_BL, log_probs_BL, 0).sum()
        metrics = {**riding.metrics, "cross_entropy": cross_entropy.item()}
        return Loss(cross_entropy + riding.total, int(counted_BL.sum()), riding.statistics, metrics)
