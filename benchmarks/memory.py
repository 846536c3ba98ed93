"""Memory of training: planned against measured bytes with every switch, and what each does to the gradients.

Prints one JSON row per claim; the plan is `k2.planner.memory`'s. Measured is first what torch's allocator gives out, on
a CPU; then what torch's MemTracker sees, which follows tensors and misses what operators take for themselves; then the
peak of a fresh process's resident memory over what it was before. For that oneDNN's caches of compiled kernels are off:
they grow with every shape that comes by and are no part of a step. The gradients of `fp8_storage` are compared with the
exact ones of the same step, all parameters together.
"""

import ctypes
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _table import Row, row, run

from k2.config.load import load_config
from k2.config.pretrain import PretrainConfig
from k2.planner.layout import PUBLISHED_RECOMPUTE, default_layout
from k2.planner.memory import Memory, stage_memory
from k2.training.batches import NextTokenLoss
from k2.training.footprint import measure, random_batch, take_step, tracked
from k2.training.pretraining import build

PRESETS = {"tiny": 2048, "small": 2048}
"""Tokens of a micro-batch. A step has two; that of `tiny` has one, that of `small` 256, of which two are enough."""
SWITCHES: dict[str, dict[str, Any]] = {
    "recompute=norms": {"recompute": ("norms",)},
    "recompute=mla_up_projections": {"recompute": ("mla_up_projections",)},
    "recompute=attention_probabilities": {"recompute": ("attention_probabilities",)},
    "recompute=mlp_up_projections": {"recompute": ("mlp_up_projections",)},
    "recompute=layers": {"recompute": ("layers",)},
    "fp8_storage": {"fp8_storage": True},
    "offload_activations": {"offload_activations": True},
    "param_dtype=bfloat16": {"param_dtype": "bfloat16"},
    "Kimi K2's": {"recompute": PUBLISHED_RECOMPUTE, "fp8_storage": True, "offload_activations": True},
}
NO_CACHES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Of compiled kernels; and freed blocks go back to the system."""
MIB = 2**20


def gradients(config: PretrainConfig, tokens: int) -> torch.Tensor:
    """Of one step on random tokens, in one row."""
    state, _ = build(config)
    loss = NextTokenLoss(config.balance_loss_weight)(state.model, random_batch(config, tokens))
    loss.total.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten().float() for p in state.model.parameters() if p.grad is not None])


def with_switches(preset: str, step_tokens: int, **switches: Any) -> PretrainConfig:
    """A preset with steps of so many tokens."""
    return load_config(preset).pretrain.model_copy(update={"batch_tokens": step_tokens, **switches})


def plan(config: PretrainConfig, tokens: int) -> Memory:
    """Of this process."""
    return stage_memory(config, replace(default_layout(config), micro_batch_tokens=tokens), 0, "cpu")


def compared(claim: str, ours: float, peer: str, theirs: float) -> Row:
    """Planned over measured, or the other way round."""
    text = f"{claim}: planned {ours / MIB:.1f} MiB, measured {theirs / MIB:.1f}"
    return row(text, peer, [max(ours / theirs, theirs / ours)], 1.05, "lower")


def components(preset: str, tokens: int) -> Iterator[Row]:
    """Planned over measured bytes of every component, and of the peak by all ways to measure it."""
    config = with_switches(preset, 2 * tokens)
    planned, found = plan(config, tokens), measure(config, tokens)
    pairs = {name: (getattr(planned, name), getattr(found, name)) for name in ("parameters", "gradients", "optimizer")}
    pairs |= {"activations": (planned.activations + planned.logits, found.activations)}
    for name, (ours, theirs) in pairs.items():
        yield compared(f"{preset}, {name}", ours, "allocator", theirs)
    yield compared(f"{preset}, peak in {planned.peak}", planned.gpu, f"allocator, in {found.peak}", found.total)
    yield compared(f"{preset}, peak", planned.gpu, "resident memory", resident(preset, tokens))
    yield compared(f"{preset}, peak", planned.gpu, "MemTracker", tracked(config, tokens))


def switched(preset: str, tokens: int) -> Iterator[Row]:
    """Planned over measured peak with every switch."""
    for name, switches in SWITCHES.items():
        config = with_switches(preset, 2 * tokens, **switches)
        planned, found = plan(config, tokens), measure(config, tokens, update=False)
        claim = f"{preset}, {name}, peak in {planned.peak}"
        yield compared(claim, planned.gpu, f"allocator, in {found.peak}", found.total)


def resident(preset: str, tokens: int) -> int:
    """Most bytes of a fresh process while it builds a run and makes a step, over those before."""
    os.environ |= NO_CACHES
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_resident, preset, tokens).result()


def _resident(preset: str, tokens: int) -> int:
    torch.set_num_threads(1)
    _take("nano", 512)  # libraries are loaded when they are first used
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is no longer there
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    _take(preset, tokens)
    return _status("VmHWM") - before


def _take(preset: str, tokens: int) -> None:
    config = with_switches(preset, 2 * tokens)
    state, _ = build(config)
    for _ in range(
        2
    ):  # memory that nobody has written to is not resident, such as the optimizer's before its first step
        state.optimizer.zero_grad()
        take_step(state, config, random_batch(config, tokens), update=True)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def savings(preset: str, tokens: int) -> Iterator[Row]:
    """What each switch leaves of the kept activations, and how far it moves the gradients."""
    plain = with_switches(preset, tokens)
    kept, exact = measure(plain, tokens).activations, gradients(plain, tokens)
    for name, switches in SWITCHES.items():
        changed = with_switches(preset, tokens, **switches)
        found, moved = measure(changed, tokens), gradients(changed, tokens)
        error = float((moved - exact).norm() / exact.norm())
        claim = f"{preset}, {name}: kept {found.activations / MIB:.1f} of {kept / MIB:.1f} MiB"
        yield row(f"{claim}, gradients moved by {error:.1e}", "no switch", [found.activations / kept], None, "lower")


def rows(_: int) -> Iterator[Row]:
    """Bytes do not vary: one round is all there is."""
    yield from savings("tiny", PRESETS["tiny"])
    for preset, tokens in PRESETS.items():
        yield from components(preset, tokens)
        yield from switched(preset, tokens)


if __name__ == "__main__":
    run(__doc__, rows, 1)
