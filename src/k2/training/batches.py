"""Token batches and the next-token loss that pretraining, fine-tuning and quantisation-aware training share.

Letters in shapes: B batch, L length.
"""

from collections.abc import Callable
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


def next_token_loss(balance_weight: float = 0.0) -> Callable[[Transformer, TokenBatch], Loss]:
    """Cross-entropy in nats over targets that are not IGNORE, plus DeepSeek-V3's sequence-wise balance loss.

    Args:
        balance_weight: the balance loss's alpha (DeepSeek-V3: 1e-4); 0 leaves it out.
    """

    def loss_fn(model: Transformer, batch: TokenBatch) -> Loss:
        hidden_BLD, statistics = model(
            batch.tokens_BL, documents_BL=batch.documents_BL, with_balance_loss=balance_weight > 0
        )
        counted_BL = batch.targets_BL != IGNORE
        log_probs_BL = model.log_probs(hidden_BLD, batch.targets_BL.clamp(min=0))
        weight = int(counted_BL.sum())
        cross_entropy = -torch.where(counted_BL, log_probs_BL, 0).sum()
        balance = statistics.balance_loss * weight
        metrics = {"cross_entropy": cross_entropy.item(), "balance_loss": balance.item()}
        return Loss(cross_entropy + balance_weight * balance, weight, statistics, metrics)

    return loss_fn
