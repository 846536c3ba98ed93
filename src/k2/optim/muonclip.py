"""MuonClip, the optimizer of Kimi K2 (report section 2.1, Algorithm 1; details from Moonlight, arXiv 2502.16982).

Muon runs on *logical* matrices: each expert alone, gate and up apart, whole head projections. Matrices of equal shape,
from whatever layers, are orthogonalised as one batch. AdamW takes embeddings, head and gains. QK-Clip follows.

Letters in shapes: N matrices, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from k2.config.optimizer import OptimizerConfig
from k2.model.layout import LogicalTensor
from k2.optim.newton_schulz import orthogonalize
from k2.optim.norms import stable_norm
from k2.optim.partition import Block, partition
from k2.optim.qk_clip import ClipReport, QKClip


class MuonClip(torch.optim.Optimizer):
    """Muon + AdamW + QK-Clip over the parameters of one model.

    Weights that are not float32 get a float32 master here, and are rounded from it after every step.

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
    ) -> None:
        layout = list(layout) if config.matrices == "muon" else _without_muon(layout)
        self.config = config
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        parts = partition(layout, {name: tuple(p.shape) for name, p in self._parameters.items()})
        muon = dict.fromkeys(block.parameter for block in parts.blocks)
        groups = [{"params": [self._parameters[n] for n in names], "lr": lr} for names in (muon, parts.adamw)]
        super().__init__(groups, {})
        self._muon, self._adamw = list(muon), list(parts.adamw)
        self._batches = _equal_shapes(parts.blocks)
        self._weights = {name: _master(p) for name, p in self._parameters.items()}
        self._tensors = self._initial_state()
        self._steps = 0
        self.qk_clip = QKClip(layout, config.tau)
        self.clip_report = ClipReport(self.qk_clip.maxima, torch.ones_like(self.qk_clip.maxima))
        self.update_rms = 0.0

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
        momenta = [self._tensors[f"momentum.{name}"] for name in self._muon]
        torch._foreach_mul_(momenta, self.config.momentum)
        torch._foreach_add_(momenta, [gradients[name] for name in self._muon])
        torch._foreach_mul_([self._weights[name] for name in self._muon], 1 - lr * self.config.weight_decay)
        squares = [self._muon_batch(shape, blocks, gradients, lr) for shape, blocks in self._batches.items()]
        size = sum(momentum.numel() for momentum in momenta)
        self.update_rms = (torch.stack(squares).sum() / size).sqrt().item()

    def _muon_batch(
        self, shape: tuple[int, int], blocks: list[Block], gradients: Mapping[str, Tensor], lr: float
    ) -> Tensor:
        """Update all matrices of one shape; returns the sum of squares of their updates, without the learning rate."""
        dtype = torch.bfloat16 if self.config.newton_schulz_bf16 else torch.float32
        first = self._weights[blocks[0].parameter]
        counts = [block.count for block in blocks]
        update_NRC = torch.empty(sum(counts), *shape, dtype=dtype, device=first.device)
        parts = torch.split(update_NRC, counts)
        for block, part in zip(blocks, parts, strict=True):
            self._direction(block, gradients, part)
        update_NRC = orthogonalize(update_NRC, self.config.newton_schulz_steps, dtype)
        # Lemma 1 of Moonlight: a full-rank orthogonal [R, C] has the RMS 1 / sqrt(max(R, C)).
        scale = self.config.update_rms * sqrt(max(shape))
        for block, part in zip(blocks, torch.split(update_NRC, counts), strict=True):
            block.of(self._weights[block.parameter]).add_(part, alpha=-lr * scale)
        norm = stable_norm(update_NRC) * scale
        return norm.square()

    def _direction(self, block: Block, gradients: Mapping[str, Tensor], out_NRC: Tensor) -> None:
        momentum = block.of(self._tensors[f"momentum.{block.parameter}"])
        if self.config.nesterov:
            torch.add(block.of(gradients[block.parameter]), momentum, alpha=self.config.momentum, out=out_NRC)
        else:
            out_NRC.copy_(momentum)

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
        counters = {"qk_clip.counts": self.qk_clip.counts, "steps": torch.tensor(self._steps)}
        return self._tensors | masters | counters

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


def _equal_shapes(blocks: Iterable[Block]) -> dict[tuple[int, int], list[Block]]:
    batches: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for block in blocks:
        batches[block.shape].append(block)
    return dict(batches)


def _master(parameter: nn.Parameter) -> Tensor:
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float()


def _gradient(parameter: nn.Parameter, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if parameter.grad is None else parameter.grad.to(weight.dtype)
