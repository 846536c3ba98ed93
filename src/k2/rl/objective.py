"""The K2 policy objective (report section 3.2.3): a squared gap between centred reward and scaled log-ratio.

    L(theta) = E_x [ 1/K sum_i ( r(x, y_i) - rbar(x) - tau log( pi_theta(y_i|x) / pi_old(y_i|x) ) )^2 ]

No value network, no normalisation by the standard deviation, no ratio clipping; the log-ratio is of whole responses.

Letters in shapes: B samples, L length.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k2.errors import StageError
from k2.model.transformer import Statistics, Transformer
from k2.training.batches import NextTokenLoss, TokenBatch
from k2.training.loop import Loss

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this, so that one stray sample cannot dominate; beyond, its gradient is zero."""


@dataclass(frozen=True)
class RolloutBatch:
    """Samples that are trained on together: the token ids of the rollout itself, never re-tokenised text.

    tokens_BL: prompt and response, padded on the right.
    response_BL: True where a token was produced by the policy.
    keep_BL: True on real tokens.
    rollout_logprobs_BL: what the rollout engine reported, 0 outside responses.
    old_logprobs_B: log pi_old of each response; None means the policy right now (the first update of an iteration).
    advantages_B: reward minus the mean reward of the sample's group.
    measures: further numbers per sample for the curves (reward, length, ...), [B] each.
    temperature: of the sampling policy, which is the policy that is trained.
    """

    tokens_BL: Tensor
    response_BL: Tensor
    keep_BL: Tensor
    rollout_logprobs_BL: Tensor
    advantages_B: Tensor
    temperature: float
    measures: Mapping[str, Tensor]
    old_logprobs_B: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return int(self.keep_BL.sum())

    def with_old(self, old_logprobs_B: Tensor | None) -> "RolloutBatch":
        """The batch with log pi_old."""
        return replace(self, old_logprobs_B=old_logprobs_B)

    def select(self, kept_B: Tensor) -> "RolloutBatch":
        """The batch without some of its samples."""
        old = None if self.old_logprobs_B is None else self.old_logprobs_B[kept_B]
        return replace(
            self,
            tokens_BL=self.tokens_BL[kept_B],
            response_BL=self.response_BL[kept_B],
            keep_BL=self.keep_BL[kept_B],
            rollout_logprobs_BL=self.rollout_logprobs_BL[kept_B],
            advantages_B=self.advantages_B[kept_B],
            measures={name: values_B[kept_B] for name, values_B in self.measures.items()},
            old_logprobs_B=old,
        )


@dataclass(frozen=True)
class PtxBatch:
    """Demonstrations for the auxiliary language-model loss of a step with `samples` rollouts."""

    demonstrations: TokenBatch
    samples: int

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return self.demonstrations.tokens


def squared_gap(advantages_B: Tensor, log_ratios_B: Tensor, tau: float) -> Tensor:
    """K2's loss per sample [B], divided by 2 tau.

    The division changes no minimum. It makes the gradient at log-ratio 0 the plain policy gradient
    -(r - rbar) grad log pi, whatever tau is, so that the PTX coefficient means the same for every tau.
    """
    clamped_B = log_ratios_B.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (advantages_B - tau * clamped_B) ** 2 / (2 * tau)


def response_logprobs(model: Transformer, batch: RolloutBatch) -> tuple[Tensor, Statistics]:
    """Log-probability [B, L] of each response token under the model at the sampling temperature, 0 elsewhere."""
    hidden_BLD, statistics = model(batch.tokens_BL[:, :-1], keep_BL=batch.keep_BL[:, :-1])
    wanted_BL = batch.response_BL[:, 1:]
    targets_BL = batch.tokens_BL[:, 1:]
    logprobs_T = model.log_probs(hidden_BLD[wanted_BL] / batch.temperature, targets_BL[wanted_BL])
    logprobs_BL = logprobs_T.new_zeros(targets_BL.shape).masked_scatter(wanted_BL, logprobs_T)
    return torch.nn.functional.pad(logprobs_BL, (1, 0)), statistics


def rollout_loss(model: Transformer, batch: RolloutBatch, tau: float) -> Loss:
    """K2's objective summed over samples.

    A sample whose log-probability is not finite is left out and counted in the metric `failed`; the forward pass is
    repeated without it, because a zero gradient times NaN is NaN.

    Raises:
        StageError: no sample is left.
    """
    logprobs_BL, statistics = response_logprobs(model, batch)
    finite_B = logprobs_BL.detach().sum(1).isfinite()
    if not finite_B.any():
        raise StageError(f"all {len(finite_B)} samples of a batch have log-probabilities that are not finite")
    if not finite_B.all():
        loss = rollout_loss(model, batch.select(finite_B), tau)
        return replace(loss, metrics={**loss.metrics, "failed": float((~finite_B).sum())})
    current_B = logprobs_BL.sum(1)
    old_B = current_B.detach() if batch.old_logprobs_B is None else batch.old_logprobs_B
    losses_B = squared_gap(batch.advantages_B, current_B - old_B, tau)
    metrics = _metrics(batch, logprobs_BL.detach(), current_B.detach() - old_B)
    return Loss(losses_B.sum(), len(losses_B), statistics, metrics)


def policy_loss(tau: float, ptx_coefficient: float) -> Callable[[Transformer, RolloutBatch | PtxBatch], Loss]:
    """The loss function of the training loop: K2's objective plus `ptx_coefficient` times the PTX loss.

    The PTX loss, a mean over tokens, is scaled to the step's samples and adds no weight, so it is added to the mean.
    """
    ptx_loss = NextTokenLoss()

    def loss_fn(model: Transformer, batch: RolloutBatch | PtxBatch) -> Loss:
        if isinstance(batch, RolloutBatch):
            return rollout_loss(model, batch, tau)
        loss = ptx_loss(model, batch.demonstrations)
        scale = batch.samples / loss.weight
        metrics = {"ptx_loss": loss.total.item() * scale}
        return Loss(ptx_coefficient * scale * loss.total, 0, loss.statistics, metrics)

    return loss_fn


def _metrics(batch: RolloutBatch, logprobs_BL: Tensor, log_ratios_B: Tensor) -> dict[str, float]:
    """Sums over samples; the gap is between what the trainer and the rollout engine say of the same token."""
    gap_BL = (logprobs_BL - batch.rollout_logprobs_BL).abs() * batch.response_BL
    lengths_B = batch.response_BL.sum(1)
    measured = {name: values_B.sum().item() for name, values_B in batch.measures.items()}
    return measured | {
        "logprob_gap": (gap_BL.sum(1) / lengths_B).sum().item(),
        "logprob_gap_max": gap_BL.amax(1).sum().item(),
        "log_ratio": log_ratios_B.sum().item(),
        "nll_per_token": -(logprobs_BL.sum(1) / lengths_B).sum().item(),
        "failed": 0.0,
    }
