"""QK-Clip: shrink a head's query and key weights when its logits grew past tau (Kimi K2 report, section 2.1).

For multi-head latent attention the query and key rows without position shrink by sqrt(gamma), the rotary query rows
by gamma; values and the rotary key, which all heads share, stay. Every logit of the head then scales by gamma.

Letters in shapes: N layers, H heads, O output rows of a projection.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from k2.model.layout import HeadRows, LogicalTensor


@dataclass(frozen=True)
class ClipReport:
    """What one step's clipping saw and did.

    maxima: `[N, H]` largest logit of every head over the step's batch.
    gammas: `[N, H]` factors applied; one where nothing was done.
    """

    maxima: Tensor
    gammas: Tensor

    @property
    def clipped(self) -> int:
        """Number of heads that were clipped."""
        return int((self.gammas < 1).sum())


def clip_factors(maxima: Tensor, tau: float | None) -> Tensor:
    """`tau / max` for heads above tau, else one: negative, unseen (-inf) and NaN maxima change nothing."""
    ones = torch.ones_like(maxima)
    return ones if tau is None else torch.where(maxima > tau, tau / maxima, ones)


def row_factors(rows: HeadRows, gamma_H: Tensor) -> Tensor:
    """Factor of every row of a projection, `[O]`, in the order `HeadRows` gives."""
    columns = [
        gamma_H.sqrt()[:, None].expand(-1, rows.content),
        gamma_H[:, None].expand(-1, rows.rotary),
        torch.ones_like(gamma_H)[:, None].expand(-1, rows.per_head - rows.content - rows.rotary),
    ]
    return torch.cat(columns, dim=1).flatten()


class QKClip:
    """Running maxima of one step and the counters of all steps.

    counts: `[N, H]` how often each head was clipped so far; saved with the optimizer.
    """

    def __init__(self, layout: Iterable[LogicalTensor], tau: float | None) -> None:
        self.tau = tau
        self._targets: dict[int, list[tuple[str, HeadRows]]] = defaultdict(list)
        for tensor in layout:
            if tensor.head_rows is not None and tensor.layer is not None:
                self._targets[tensor.layer].append((tensor.parameter, tensor.head_rows))
        heads = next(iter(self._targets.values()))[0][1].heads
        self.counts = torch.zeros(len(self._targets), heads, dtype=torch.int64)
        self.maxima = torch.full(self.counts.shape, -torch.inf)

    def observe(self, maxima_NH: Tensor) -> None:
        """Take in one micro-batch. A maximum is idempotent: seeing a recomputed forward pass twice is harmless."""
        self.maxima = torch.maximum(self.maxima, maxima_NH.detach().to("cpu", torch.float32))

    def reset(self) -> None:
        """Forget the maxima seen since the last step."""
        self.maxima = torch.full_like(self.maxima, -torch.inf)

    @torch.no_grad()
    def apply(self, weights: Mapping[str, Tensor]) -> ClipReport:
        """Scale the rows of clipped heads in the (master) weights, count them, and forget the maxima."""
        report = ClipReport(self.maxima, clip_factors(self.maxima, self.tau))
        for layer in torch.nonzero((report.gammas < 1).any(dim=1)).flatten().tolist():
            for name, rows in self._targets[layer]:
                factors_O = row_factors(rows, report.gammas[layer])
                weights[name].mul_(factors_O[:, None].to(weights[name]))
        self.counts += report.gammas < 1
        self.reset()
        return report
