"""The one training loop. Pretraining, fine-tuning, quantisation-aware training and RL differ in data and loss only.

A stage builds a `TrainState`, a `Source` of micro-batches and a `LossFn`, and calls `train`; for RL the source makes
rollouts with the live policy. Nothing here knows the time, so a resumed run makes the same bytes.

Letters in shapes: M layers with experts, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from k2.errors import StageError
from k2.execution.contract import Progress
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.moe import MixtureOfExperts, bias_step
from k2.model.transformer import DecoderLayer, Statistics, Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.norms import stable_norm
from k2.optim.qk_clip import ClipReport
from k2.planner.layout import Layout
from k2.training.instruments import StepReport, expert_shares, measure_spectrum, reason_to_skip, show, spike_in
from k2.training.rollback import leave_out, roll_back
from k2.training.state import BatchT, BatchT_contra, Saver, Source, TrainState

LOSS_MEMORY = 0.9
"""Share of the running mean of the loss that a step keeps; the mean is what spikes are measured against."""


@dataclass(frozen=True)
class Loss:
    """What a loss function returns for one micro-batch.

    total: scalar with gradient, the loss SUMMED over `weight` items; gradients are divided by the step's weight,
        so that accumulation equals one large batch.
    weight: number of items summed (target tokens, or whatever the objective averages over).
    statistics: of the model's forward pass.
    metrics: further sums over the items, reported as means (reward, KL, accuracy, ...).
    """

    total: Tensor
    weight: float
    statistics: Statistics
    metrics: Mapping[str, float] = field(default_factory=dict)


class LossFn(Protocol[BatchT_contra]):
    """Forward pass and objective."""

    def __call__(self, model: Transformer, batch: BatchT_contra, /) -> Loss:
        """The summed loss of one micro-batch."""


@dataclass(frozen=True)
class Aftermath:
    """What the ranks found out about each other in a step.

    ends: some rank was told to end.
    slow: which ranks computed much longer than others with the same work, or None.
    """

    ends: bool = False
    slow: str | None = None


class ParallelPlan(Protocol):
    """How the ranks of a run share one step. Every trained value is in exactly one rank's optimizer.

    Attributes:
        layout: degrees of parallelism.
        data_rank: which of `layout.data_parallel` equal parts of every step's rows this rank reads.
    """

    layout: Layout

    @property
    def data_rank(self) -> int: ...

    def losses(
        self, model: Transformer, batches: Iterable[BatchT], loss_fn: LossFn[BatchT]
    ) -> Iterable[tuple[int, Loss]]:
        """Pass this rank's micro-batches through the model, and their gradients back where gradients are enabled.

        Returns tokens and losses whose sum over all ranks is the step's, statistics those of the whole model.
        """

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, in place."""

    def max_(self, tensor: Tensor) -> None:
        """Maximum over all ranks, in place."""

    def reduce_gradients(self) -> None:
        """Give what this rank's optimizer updates the sum of all ranks' gradients."""

    def not_finite(self) -> list[int]:
        """The ranks whose own rows gave gradients that are no numbers; of one rank that is no news."""

    def share_update(self, optimizer: MuonClip) -> None:
        """Bring every rank's update to the ranks that compute with those weights, and make its RMS that of all."""

    def after(self, step: int) -> Aftermath:
        """End step number `step`; the same answer on all ranks."""

    def published(self, model: Transformer) -> list[LogicalTensor]:
        """The tensors of this rank's part that it publishes; together the ranks have every tensor once."""


class SingleProcess:
    """The 1x1x1 plan: nothing to share."""

    layout, data_rank = Layout(), 0

    def losses(
        self, model: Transformer, batches: Iterable[BatchT], loss_fn: LossFn[BatchT]
    ) -> Iterator[tuple[int, Loss]]:
        """One micro-batch after the other."""
        return one_by_one(model, batches, loss_fn)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """One rank's sum is the sum."""

    def max_(self, tensor: Tensor) -> None:
        """One rank's maximum is the maximum."""

    def reduce_gradients(self) -> None:
        """One rank's gradients are the gradients."""

    def not_finite(self) -> list[int]:
        """There is only one to blame."""
        return []

    def share_update(self, optimizer: MuonClip) -> None:
        """The weights are already where they are used."""

    def after(self, step: int) -> Aftermath:
        """One rank has nobody to wait for."""
        return Aftermath()

    def published(self, model: Transformer) -> list[LogicalTensor]:
        """One rank has all tensors."""
        return logical_tensors(model.config)


def one_by_one(model: Transformer, batches: Iterable[BatchT], loss_fn: LossFn[BatchT]) -> Iterator[tuple[int, Loss]]:
    """What a model that has all layers does with micro-batches: see `ParallelPlan.losses`."""
    for batch in batches:
        loss = loss_fn(model, batch)
        if loss.total.requires_grad:
            loss.total.backward()  # type: ignore[no-untyped-call]
        yield batch.tokens, loss


@dataclass
class _Sums:
    """What accumulates over the micro-batches of a step; `metrics` are sums over `weight` items."""

    weight: float = 0.0
    tokens: int = 0
    loss: float = 0.0
    expert_counts_ME: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, tokens: int, loss: Loss) -> None:
        self.weight += loss.weight
        self.tokens += tokens
        self.loss += loss.total.item()
        # Counts come from the forward pass's return value, so recomputation in the backward pass adds nothing.
        counts = loss.statistics.expert_counts_ME
        self.expert_counts_ME = counts if self.expert_counts_ME is None else self.expert_counts_ME + counts
        for name, value in loss.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


def train_step(
    state: TrainState,
    batches: Iterable[BatchT],
    loss_fn: LossFn[BatchT],
    lr: Callable[[int], float],
    plan: ParallelPlan | None = None,
) -> StepReport:
    """One optimizer step over all micro-batches.

    Args:
        lr: learning rate as a function of the tokens seen after this step.
    Raises:
        StageError: too many updates in a row had to be skipped (non-finite gradient, or a loss spike), or the loss is
            a spike and the policy is to stop.
    """
    plan, optimizer = plan or SingleProcess(), state.optimizer
    state.model.train()
    state.model.zero_grad()
    optimizer.zero_grad()
    sums = _accumulate(state, batches, loss_fn, plan)
    _share(sums, optimizer, plan)
    loss, grad_norm = sums.loss / sums.weight, _normalize_gradients(optimizer, sums.weight, plan)
    rate = lr(state.tokens + sums.tokens)
    maxima = optimizer.qk_clip.maxima.amax(1).tolist()
    spike = spike_in(state, loss)
    guilty = [] if isfinite(grad_norm) else plan.not_finite()
    skipped = reason_to_skip(optimizer.config, loss, grad_norm, spike, guilty)
    if skipped is None:
        _update(state, sums, loss, rate, plan)
    clip = ClipReport.nothing(optimizer.qk_clip.maxima) if skipped else optimizer.clip_report
    state.step, state.tokens = state.step + 1, state.tokens + sums.tokens
    state.skipped = state.skipped + 1 if skipped else 0
    if state.skipped > optimizer.config.max_skipped_steps:
        raise StageError(f"step {state.step}: {state.skipped} updates in a row were skipped, the last: {skipped}")
    load, floor = expert_shares(sums.expert_counts_ME)
    return StepReport(
        step=state.step,
        tokens=state.tokens,
        loss=loss,
        lr=rate,
        grad_norm=grad_norm,
        update_rms=0.0 if skipped else optimizer.update_rms,
        max_logits=maxima,
        clipped_heads=clip.clipped,
        gammas=clip.gammas.amin(1).tolist(),
        expert_load=load,
        expert_floor=floor,
        spike=spike,
        skipped=skipped,
        metrics={name: value / sums.weight for name, value in sums.metrics.items()},
    )


def _accumulate(state: TrainState, batches: Iterable[BatchT], loss_fn: LossFn[BatchT], plan: ParallelPlan) -> _Sums:
    sums = _Sums()
    for tokens, loss in plan.losses(state.model, batches, loss_fn):
        state.optimizer.qk_clip.observe(loss.statistics.max_logits_NH)
        sums.add(tokens, loss)
    return sums


def _share(sums: _Sums, optimizer: MuonClip, plan: ParallelPlan) -> None:
    """Make the sums and maxima those of all ranks: each is counted once, globally."""
    names = sorted(sums.metrics)
    scalars = torch.tensor(
        [sums.weight, sums.tokens, sums.loss, *(sums.metrics[n] for n in names)], dtype=torch.float64
    )
    counts = [] if sums.expert_counts_ME is None else [sums.expert_counts_ME]
    plan.sum_([scalars, *counts])
    plan.max_(optimizer.qk_clip.maxima)
    plan.reduce_gradients()
    sums.weight, tokens, sums.loss, *values = scalars.tolist()
    sums.tokens, sums.metrics = int(tokens), dict(zip(names, values, strict=True))


def _normalize_gradients(optimizer: MuonClip, weight: float, plan: ParallelPlan) -> float:
    """Divide the summed gradients by the weight, clip their global norm if configured, and return it unclipped."""
    gradients = [parameter.grad for parameter in optimizer.trained() if parameter.grad is not None]
    # The square of a float32 is exact in float64, so that one rank's norm keeps its bits.
    squared = torch.stack([stable_norm(gradient) for gradient in gradients]).norm().double().square().cpu()
    plan.sum_([squared])
    norm, limit = float(squared.sqrt()) / weight, optimizer.config.max_grad_norm
    torch._foreach_mul_(gradients, (1.0 if limit is None or norm <= limit else limit / norm) / weight)
    return norm


def _update(state: TrainState, sums: _Sums, loss: float, lr: float, plan: ParallelPlan) -> None:
    state.optimizer.set_lr(lr)
    state.optimizer.step()
    plan.share_update(state.optimizer)
    if sums.expert_counts_ME is not None:
        balance_experts(state.model, sums.expert_counts_ME, state.optimizer.config.bias_update_speed)
    mean = loss if state.mean_loss is None else state.mean_loss
    state.mean_loss = LOSS_MEMORY * mean + (1 - LOSS_MEMORY) * loss


@torch.no_grad()
def balance_experts(model: Transformer, counts_ME: Tensor, speed: float) -> None:
    """Move every router's selection bias by Moonlight's rule, from the token counts of the whole step.

    `counts_ME` are those of all layers, of which the model may have some.
    """
    for number, layer in model.layers.items():
        if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MixtureOfExperts):
            counts_E = counts_ME[int(number) - model.config.first_k_dense_replace]
            layer.mlp.gate.e_score_correction_bias += speed * bias_step(counts_E)


def train(
    state: TrainState,
    source: Source[BatchT],
    loss_fn: LossFn[BatchT],
    lr: Callable[[int], float],
    *,
    until: int,
    progress: Progress,
    checkpoints: Saver | None = None,
    total: int | None = None,
    plan: ParallelPlan | None = None,
) -> None:
    """Make steps until `state.step` is `until`, saving what a resumed run needs.

    Call `checkpoints.restore(state, source)` first; a state that is already past `until` makes no step.

    Args:
        total: steps of the whole stage when this call is one phase of it, for progress only.
    Raises:
        StageError: as `train_step`.
    """
    plan = plan or SingleProcess()
    while state.step < until:
        leave_out(state, source)
        report = train_step(state, source.next_step(), loss_fn, lr, plan)
        state.history.add(report.row())
        show(state, report, total or until, progress)
        if report.spike and state.optimizer.config.spike_policy == "rollback" and checkpoints is not None:
            roll_back(state, source, checkpoints, progress)
            continue
        measure_spectrum(state, progress)
        found = plan.after(state.step)
        if found.slow:
            progress.event("slow_rank", step=state.step, ranks=found.slow)
        if checkpoints is not None and checkpoints.step(state, source):
            progress.event("checkpoint", step=state.step)
        if found.ends:
            _end(state, source, checkpoints)


def _end(state: TrainState, source: Source[BatchT], checkpoints: Saver | None) -> NoReturn:
    """Leave before the time of grace is over, with everything saved."""
    if checkpoints is not None:
        checkpoints.save(state, source)
    raise StageError(f"told to end after step {state.step}; started again, it goes on from there")
