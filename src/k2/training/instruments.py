"""What a step saw and did: its line in the history, its metrics and events, and what makes a loss a spike.

Letters in shapes: N layers, M layers with experts, H heads, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from k2.config.optimizer import OptimizerConfig
from k2.errors import StageError
from k2.execution.contract import Progress
from k2.training.state import TrainState


@dataclass(frozen=True)
class StepReport:
    """What one step saw and did; `row` is its line in the history.

    max_logits: largest attention logit of each layer, N numbers.
    clipped_heads: heads that QK-Clip rescaled.
    gammas: smallest factor of QK-Clip in each layer, N numbers; 1 where no head was above tau.
    expert_load: busiest expert's share relative to an equal one, for each of M layers; 1 is perfect balance.
    expert_floor: the same of the idlest expert; 0 got no token.
    spike: why the loss is a spike, or None.
    skipped: why the update was not made, or None.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    update_rms: float
    max_logits: list[float]
    clipped_heads: int
    gammas: list[float]
    expert_load: list[float]
    expert_floor: list[float]
    spike: str | None
    skipped: str | None
    metrics: dict[str, float]

    def row(self) -> dict[str, Any]:
        """The values as JSON; of a spike and a skip only that there was one."""
        reasons = {name: int(getattr(self, name) is not None) for name in ("spike", "skipped")}
        scalars = {name: value for name, value in vars(self).items() if name not in ("spike", "skipped", "metrics")}
        return scalars | reasons | self.metrics


def spike_in(state: TrainState, loss: float) -> str | None:
    """Why `loss` is a spike, or None."""
    margin = state.optimizer.config.spike_margin
    if margin is None or state.mean_loss is None or not loss > state.mean_loss + margin:
        return None
    return f"loss {loss:.4f} is more than {margin} above its running mean {state.mean_loss:.4f}"


def reason_to_skip(
    config: OptimizerConfig, loss: float, grad_norm: float, spike: str | None, guilty: Sequence[int] = ()
) -> str | None:
    """Why the update must not be made, or None; `guilty` are the ranks whose gradients are not finite.

    Raises:
        StageError: the loss is a spike, and the policy is to stop.
    """
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        ranks = f", from rank {' and rank '.join(map(str, guilty))}" if guilty else ""
        return f"loss {loss}, gradient norm {grad_norm}{ranks}"
    if spike is not None and config.spike_policy == "stop":
        raise StageError(f"{spike}, and optimizer.spike_policy is stop")
    return spike if config.spike_policy in ("skip", "rollback") else None


def expert_shares(counts_ME: Tensor | None) -> tuple[list[float], list[float]]:
    """The busiest and the idlest expert's tokens over the mean, for each of M layers."""
    if counts_ME is None or not len(counts_ME):
        return [], []
    shares_ME = counts_ME.double() / counts_ME.double().mean(1, keepdim=True)
    return shares_ME.amax(1).tolist(), shares_ME.amin(1).tolist()


def _rewards(metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean reward, and the share of verifiable pairs of answers that the critic orders as they are, where known."""
    values = {"reward": metrics["reward"]} if "reward" in metrics else {}
    if metrics.get("critic_pairs"):
        values["critic_agreement"] = metrics["critic_agreed"] / metrics["critic_pairs"]
    return values


def show(state: TrainState, report: StepReport, total: int, progress: Progress) -> None:
    """Pass a step on to the progress display, the metrics and the event log."""
    tau = state.optimizer.config.tau
    names = ("loss", "lr", "tokens", "grad_norm", "update_rms", "max_logits", "gammas", "expert_load", "expert_floor")
    values = {name: getattr(report, name) for name in names} | ({} if tau is None else {"tau": tau})
    values |= _rewards(report.metrics)
    progress.update(report.step, total, "steps", max_logit=max(report.max_logits), **values)
    if report.spike:
        progress.event("loss_spike", step=report.step, reason=report.spike)
    if report.skipped:
        progress.event("skipped_update", step=report.step, reason=report.skipped)
    if report.clipped_heads:
        progress.event("qk_clip", step=report.step, heads=report.clipped_heads, max_logit=max(report.max_logits),
                       gamma=min(report.gammas))  # fmt: skip


def measure_spectrum(state: TrainState, progress: Progress) -> None:
    """Note the spectral norms of every head's query and key rows, when the configured interval says so."""
    interval = state.optimizer.config.spectral_interval
    if not interval or state.step % interval:
        return
    norms = state.optimizer.spectral_norms()
    state.notes.setdefault("spectral_norms", []).append({"step": state.step, "norms": norms})
    largest = {name: max(max(heads) for heads in layers) for name, layers in sorted(norms.items())}
    progress.event("spectral_norms", step=state.step, largest=largest)


def head_statistics(state: TrainState) -> dict[str, list[list[Any]]]:
    """What QK-Clip saw of every head over the whole run, `[N][H]`: largest logit, times clipped, smallest gamma."""
    clip = state.optimizer.qk_clip
    peaks = [[value if math.isfinite(value) else None for value in heads] for heads in clip.peaks.tolist()]
    return {"head_logits": peaks, "clip_counts": clip.counts.tolist(), "head_gammas": clip.gammas.tolist()}
