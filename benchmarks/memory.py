"""Memory of training: what each switch saves and does to the gradients, and planned against measured bytes.

Prints one JSON row per claim. Bytes are those of torch's allocator on a CPU; the plan is `k2.planner.memory`'s. The
gradients of `fp8_storage` are compared with the exact ones of the same step, all parameters together.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from _table import Row, row, run

from k2.config.load import load_config
from k2.config.pretrain import PretrainConfig
from k2.planner.layout import PUBLISHED_RECOMPUTE, default_layout
from k2.planner.memory import stage_memory
from k2.training.batches import NextTokenLoss, TokenBatch
from k2.training.footprint import measure
from k2.training.pretraining import build

PRESETS = {"tiny": 2048, "small": 2048}
"""Tokens of a micro-batch; a step of `small` has sixteen times as many, in as many micro-batches."""
SWITCHES: dict[str, dict[str, Any]] = {
    "recompute=norms": {"recompute": ("norms",)},
    "recompute=mla_up_projections": {"recompute": ("mla_up_projections",)},
    "recompute=attention_probabilities": {"recompute": ("attention_probabilities",)},
    "recompute=mlp_up_projections": {"recompute": ("mlp_up_projections",)},
    "recompute=layers": {"recompute": ("layers",)},
    "fp8_storage": {"fp8_storage": True},
    "offload_activations": {"offload_activations": True},
    "Kimi K2's": {"recompute": PUBLISHED_RECOMPUTE, "fp8_storage": True, "offload_activations": True},
}


def gradients(config: PretrainConfig, tokens: int) -> torch.Tensor:
    """Of one step on random tokens, in one row."""
    (state, _), generator = build(config), torch.Generator().manual_seed(config.seed)
    shape = tokens // config.context_length, config.context_length
    tokens_BL = torch.randint(config.model.vocab_size, shape, generator=generator)
    loss = NextTokenLoss(config.balance_loss_weight)(state.model, TokenBatch(tokens_BL, tokens_BL))
    loss.total.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None])


def with_switches(preset: str, tokens: int, **switches: Any) -> PretrainConfig:
    """A preset whose step is one micro-batch."""
    return load_config(preset).pretrain.model_copy(update={"batch_tokens": tokens, **switches})


def savings(preset: str, tokens: int) -> Iterator[Row]:
    """What each switch leaves of the kept activations, and how far it moves the gradients."""
    plain = with_switches(preset, tokens)
    kept, exact = measure(plain, tokens).activations, gradients(plain, tokens)
    for name, switches in SWITCHES.items():
        changed = with_switches(preset, tokens, **switches)
        found, moved = measure(changed, tokens), gradients(changed, tokens)
        error = float((moved - exact).norm() / exact.norm())
        claim = f"{preset}, {name}: kept {found.activations / 2**20:.1f} of {kept / 2**20:.1f} MiB"
        yield row(f"{claim}, gradients moved by {error:.1e}", "no switch", [found.activations / kept], None, "lower")


def planned(preset: str, tokens: int) -> Iterator[Row]:
    """Planned over measured bytes of every component."""
    config = with_switches(preset, tokens)
    layout = replace(default_layout(config), micro_batch_tokens=tokens)
    plan, found = stage_memory(config, layout, 0, "cpu"), measure(config, tokens)
    pairs = {name: (getattr(plan, name), getattr(found, name)) for name in ("parameters", "gradients", "optimizer")}
    pairs |= {"activations": (plan.activations + plan.logits, found.activations), "peak": (plan.gpu, found.total)}
    for name, (ours, theirs) in pairs.items():
        claim = f"{preset}, {name}: planned {ours / 2**20:.1f} MiB, measured {theirs / 2**20:.1f}"
        yield row(claim, "measured", [max(ours / theirs, theirs / ours)], 1.05, "lower")


def rows(_: int) -> Iterator[Row]:
    """Bytes do not vary: one round is all there is."""
    for preset, tokens in PRESETS.items():
        yield from planned(preset, tokens)
    yield from savings("tiny", PRESETS["tiny"])


if __name__ == "__main__":
    run(__doc__, rows, 1)
