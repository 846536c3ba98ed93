"""MuonClip, the optimizer of Kimi K2 (report section 2.1, Algorithm 1; details from Moonlight, arXiv 2502.16982).

Muon runs on *logical* matrices: each expert alone, gate and up apart, whole head projections. Matrices of equal shape,
from whatever layers, are orthogonalised together. AdamW takes embeddings, head and gains. QK-Clip follows.

Letters in shapes: N matrices, R rows, C columns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from k2.config.optimizer import OptimizerConfig
from k2.kernels import cpu
from k2.model.backend import runs_in_c
from k2.model.layout import LogicalTensor
from k2.optim.chunks import Piece, equal_shapes, total
from k2.optim.newton_schulz import Workspace
from k2.optim.norms import stable_norm
from k2.optim.partition import Block, partition
from k2.optim.qk_clip import ClipReport, QKClip, spectral_norms
from k2.optim.schemes import SCHEMES


class MuonClip(torch.optim.Optimizer):
    """Muon + AdamW + QK-Clip over the parameters of one model.

    Weights of less than float32 get a float32 master here, and are rounded from it after every step. In distributed
    training the parameters are the shards that one rank owns, and `clip_layout` is the whole model: every rank sees
    the maxima of all heads and clips those whose weights it owns.

    Attributes:
        qk_clip: running per-head maxima (`qk_clip.observe`) and the counters of clipped heads.
        clip_report: what QK-Clip did in the last step.
        update_rms: root mean square of the last step's Muon update, before the learning rate.

    Raises:
        ValueError: some parameter has no optimizer or two.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        layout: Iterable[LogicalTensor],
        config: OptimizerConfig,
        lr: float = 0.0,
        clip_layout: Iterable[LogicalTensor] | None = None,
    ) -> None:
        self._layout = layout = list(layout) if config.matrices == "muon" else _without_muon(layout)
        self.config = config
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        parts = partition(layout, {name: tuple(p.shape) for name, p in self._parameters.items()})
        muon = dict.fromkeys(block.parameter for block in parts.blocks)
        groups = [{"params": [self._parameters[n] for n in names], "lr": lr} for names in (muon, parts.adamw)]
        super().__init__(groups, {})
        self._muon, self._adamw = list(muon), list(parts.adamw)
        self._weights = {name: _master(p) for name, p in self._parameters.items()}
        self._tensors = self._initial_state()
        self._chunks = self._plan(parts.blocks)
        self._steps = 0
        self.qk_clip = QKClip(layout if clip_layout is None else clip_layout, config.tau)
        self.clip_report = ClipReport.nothing(self.qk_clip.maxima)
        self.update_rms = 0.0

    def _plan(self, blocks: tuple[Block, ...]) -> list[list[Piece]]:
        """Divide the matrices into chunks, and take the memory that every chunk is worked on in."""
        if not blocks:
            return []
        weight = self._weights[blocks[0].parameter]
        device, dtype = weight.device, torch.bfloat16 if self.config.newton_schulz_bf16 else weight.dtype
        chunks = equal_shapes(blocks, dtype, device)
        shapes = [total(pieces) for pieces in chunks]
        self._workspace = Workspace(shapes, dtype, device)
        self._in_c = weight.dtype == torch.float32 and runs_in_c(self._workspace.input(*shapes[0]))
        return chunks

    def _initial_state(self) -> dict[str, Tensor]:
        def zeros(kind: str, names: list[str]) -> dict[str, Tensor]:
            return {f"{kind}.{name}": torch.zeros_like(self._weights[name]) for name in names}

        return zeros("momentum", self._muon) | zeros("exp_avg", self._adamw) | zeros("exp_avg_sq", self._adamw)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that this optimizer updates."""
        return list(self._parameters.values())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of both groups."""
        for group in self.param_groups:
            group["lr"] = lr

    def spectral_norms(self) -> dict[str, list[list[float]]]:
        """Largest singular value of every head's query and key rows: one list of heads per layer, by projection."""
        return spectral_norms(self._layout, self._weights)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and the attention maxima that came with them."""
        super().zero_grad(set_to_none)
        self.qk_clip.reset()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every weight from its gradient, then QK-Clip. Weights without a gradient count as zero.

        Raises:
            ValueError: a closure was given; losses are not re-evaluated.
        """
        if closure is not None:
            raise ValueError("MuonClip takes no closure")
        self._steps += 1
        gradients = {name: _gradient(p, self._weights[name]) for name, p in self._parameters.items()}
        if self._muon:
            self._muon_step(gradients, self.param_groups[0]["lr"])
        self._adamw_step(gradients, self.param_groups[1]["lr"])
        self.clip_report = self.qk_clip.apply(self._weights)
        self._round_masters()

    def _muon_step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        squares = [self._muon_chunk(pieces, gradients, lr) for pieces in self._chunks]
        size = sum(self._tensors[f"momentum.{name}"].numel() for name in self._muon)
        self.update_rms = (torch.stack(squares).sum() / size).sqrt().item()

    def _muon_chunk(self, pieces: list[Piece], gradients: Mapping[str, Tensor], lr: float) -> Tensor:
        """Update some matrices of one shape; returns the sum of squares of their updates, without the learning rate.

        Everything happens to one chunk after the other, so that weights and momentum pass through the caches once.
        """
        config, shape = self.config, total(pieces)
        # Lemma 1 of Moonlight: a full-rank orthogonal [R, C] has the RMS 1 / sqrt(max(R, C)).
        scale = config.update_rms * sqrt(max(shape[1:]))
        average, update = (cpu.momentum, cpu.update) if self._in_c else (_average, _update)
        parts = [piece.count for piece in pieces]
        for piece, out in zip(pieces, self._workspace.input(*shape).split_with_sizes(parts), strict=True):
            momentum = piece.of(self._tensors[f"momentum.{piece.block.parameter}"])
            average(piece.of(gradients[piece.block.parameter]), momentum, out, config.momentum, config.nesterov)
        changes, squares = self._workspace.orthogonalize(SCHEMES[config.newton_schulz]), []
        for piece, change in zip(pieces, changes.split_with_sizes(parts), strict=True):
            weight = piece.of(self._weights[piece.block.parameter])
            squares.append(update(weight, change, 1 - lr * config.weight_decay, -lr * scale))
        square: Tensor = torch.cat(squares).sum() * scale**2
        return square

    def _adamw_step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """AdamW (arXiv 1711.05101) through torch's own fused kernel."""
        c, names = self.config, self._adamw
        adamw(
            [self._weights[n] for n in names],
            [gradients[n] for n in names],
            [self._tensors[f"exp_avg.{n}"] for n in names],
            [self._tensors[f"exp_avg_sq.{n}"] for n in names],
            [],
            # The kernel counts the step itself, before it corrects the bias.
            [torch.tensor(self._steps - 1.0, device=self._weights[n].device) for n in names],
            fused=True,
            amsgrad=False,
            beta1=c.adam_beta1,
            beta2=c.adam_beta2,
            lr=lr,
            weight_decay=c.weight_decay,
            eps=c.adam_eps,
            maximize=False,
        )

    def _round_masters(self) -> None:
        for name, parameter in self._parameters.items():
            if self._weights[name] is not parameter:
                parameter.copy_(self._weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as one flat dict of tensors in their own types (float32 masters included)."""
        masters = {f"master.{n}": w for n, w in self._weights.items() if w is not self._parameters[n]}
        clip = {f"qk_clip.{name}": getattr(self.qk_clip, name) for name in ("counts", "peaks", "gammas")}
        return self._tensors | masters | clip | {"steps": torch.tensor(self._steps)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, exactly; learning rates are not state, the schedule gives them.

        Raises:
            ValueError: the state belongs to another model.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            raise ValueError(f"optimizer state does not fit: {sorted(own.keys() ^ state_dict.keys())[:5]}")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        self._steps = int(state_dict["steps"])


def _without_muon(layout: Iterable[LogicalTensor]) -> list[LogicalTensor]:
    return [replace(tensor, group="adamw") if tensor.group == "muon" else tensor for tensor in layout]


def _master(parameter: nn.Parameter) -> Tensor:
    return parameter if parameter.dtype in (torch.float32, torch.float64) else parameter.detach().float()


def _average(gradient: Tensor, average: Tensor, out_NRC: Tensor, beta: float, nesterov: bool) -> None:
    """The running mean of gradients, and what is orthogonalised of it.

    It is (1 - beta) times Algorithm 1's sum; the orthogonal factor of both is the same.
    """
    average.lerp_(gradient, 1 - beta)
    out_NRC.copy_(torch.lerp(gradient, average, beta if nesterov else 1.0))


def _update(weight: Tensor, change_NRC: Tensor, decay: float, rate: float) -> Tensor:
    """Apply decay and update; the sum of squares of the change, [1]."""
    wide_NRC = change_NRC.to(weight.dtype)
    weight.mul_(decay).add_(wide_NRC, alpha=rate)
    return stable_norm(wide_NRC).square()[None]


def _gradient(parameter: nn.Parameter, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if parameter.grad is None else parameter.grad.to(weight.dtype).contiguous()
