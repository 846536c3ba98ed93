"""QK-Clip: shrink a head's query and key weights when its logits grew past tau (Kimi K2 report, section 2.1).

For multi-head latent attention the query and key rows without position shrink by sqrt(gamma), the rotary query rows
by gamma; values and the rotary key, which all heads share, stay. Every logit of the head then scales by gamma.
Plain multi-head attention shrinks query and key by sqrt(gamma); where heads share a key, it stays and the query
shrinks by gamma, so that no other head changes.

Letters in shapes: N layers, H heads, O output rows of a projection, P rows of one head, I input columns.
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

    @classmethod
    def nothing(cls, maxima: Tensor) -> "ClipReport":
        """Of a step that clipped no head."""
        return cls(maxima, torch.ones_like(maxima))

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


@dataclass(frozen=True)
class HeadProjection:
    """A query or key projection: its parameter, the projection's short name, and how its rows divide into heads."""

    parameter: str
    component: str
    head_rows: HeadRows


def head_projections(layout: Iterable[LogicalTensor]) -> list[list[HeadProjection]]:
    """The projections that QK-Clip scales, for each layer that has any."""
    found: dict[int, list[HeadProjection]] = defaultdict(list)
    for tensor in layout:
        if tensor.head_rows is not None and tensor.layer is not None:
            found[tensor.layer].append(HeadProjection(tensor.parameter, tensor.component, tensor.head_rows))
    return [found[layer] for layer in sorted(found)]


@torch.no_grad()
def spectral_norms(layout: Iterable[LogicalTensor], weights: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """Largest singular value of every head's query and key rows, `[N][H]` by the projection's name; no values."""
    norms: dict[str, list[list[float]]] = defaultdict(list)
    for projection in (each for layer in head_projections(layout) for each in layer):
        rows = projection.head_rows
        weight_HPI = weights[projection.parameter].float().view(rows.heads, rows.per_head, -1)
        used_HPI = weight_HPI[:, : rows.content + rows.rotary]
        norms[projection.component].append(torch.linalg.matrix_norm(used_HPI, 2).tolist())
    return dict(norms)


def plain_rows(heads: int, key_heads: int, head_dim: int) -> tuple[HeadRows, HeadRows | None]:
    """Rows of `q_proj` and `k_proj` in attention without latents (multi-head, grouped or multi-query).

    The key's are None where it is shared: nothing of it is clipped.
    """
    if key_heads == heads:
        own = HeadRows(heads, head_dim, content=head_dim, rotary=0)
        return own, own
    return HeadRows(heads, head_dim, content=0, rotary=head_dim), None


class QKClip:
    """Running maxima of one step and what all steps saw.

    All of it is `[N, H]`; N counts the layers that have attention. Saved with the optimizer:
    counts: how often each head was clipped so far.
    peaks: its largest logit so far; NaN does not count.
    gammas: the smallest factor it was clipped by so far.
    """

    def __init__(self, layout: Iterable[LogicalTensor], tau: float | None) -> None:
        self.tau = tau
        self._targets = head_projections(layout)
        self.counts = torch.zeros(len(self._targets), self._targets[0][0].head_rows.heads, dtype=torch.int64)
        self.maxima = torch.full(self.counts.shape, -torch.inf)
        self.peaks, self.gammas = self.maxima.clone(), torch.ones_like(self.maxima)

    def observe(self, maxima_NH: Tensor) -> None:
        """Take in one micro-batch. A maximum is idempotent: seeing a recomputed forward pass twice is harmless."""
        self.maxima = torch.maximum(self.maxima, maxima_NH.detach().to("cpu", torch.float32))

    def reset(self) -> None:
        """Forget the maxima seen since the last step."""
        self.maxima = torch.full_like(self.maxima, -torch.inf)

    @torch.no_grad()
    def apply(self, weights: Mapping[str, Tensor]) -> ClipReport:
        """Scale the rows of clipped heads in the (master) weights, count them, and forget the maxima.

        Projections that are not in `weights` are another rank's.
        """
        report = ClipReport(self.maxima, clip_factors(self.maxima, self.tau))
        for layer in torch.nonzero((report.gammas < 1).any(dim=1)).flatten().tolist():
            for projection in (target for target in self._targets[layer] if target.parameter in weights):
                factors_O = row_factors(projection.head_rows, report.gammas[layer])
                weights[projection.parameter].mul_(factors_O[:, None].to(weights[projection.parameter]))
        self.counts += report.gammas < 1
        torch.fmax(self.peaks, report.maxima, out=self.peaks)
        torch.minimum(self.gammas, report.gammas, out=self.gammas)
        self.reset()
        return report
