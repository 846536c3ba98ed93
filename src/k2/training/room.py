"""Whether a rank's part of training fits into its memory, asked before anything is built."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from k2.config.pretrain import PretrainConfig
from k2.errors import UserError
from k2.planner.layout import ACTIVATION_SWITCHES, Layout
from k2.planner.memory import stage_memory

GIGA = 1e9
CGROUP = Path("/sys/fs/cgroup")


def device_room() -> tuple[str, float]:
    """The device and its free bytes: a GPU's, or a rank's share of what this machine or container has left."""
    if torch.cuda.is_available():
        return "cuda", float(torch.cuda.mem_get_info()[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "cpu", min(_machine(), _container()) / ranks_here


def _machine() -> float:
    """Bytes that programs can still have; without limit where the kernel does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def _container() -> float:
    """What the container's limit leaves, if there is one. Files it has read count as used, but give way to programs."""
    limit = CGROUP / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return float("inf")
    cached = next(
        line for line in (CGROUP / "memory.stat").read_text().splitlines() if line.startswith("inactive_file")
    )
    return float(limit.read_text()) - float((CGROUP / "memory.current").read_text()) + float(cached.split()[1])


def require_room(config: PretrainConfig, layout: Layout, stage: int, device: str, room: float) -> None:
    """Refuse a layout whose rank of pipeline stage `stage` needs more than `room` bytes.

    Raises:
        UserError: says what it needs, what there is, and the first change that fits.
    """
    need = stage_memory(config, layout, stage, device)
    if need.gpu <= room:
        return
    fits = (change for changed, change in _thriftier(config, layout) if _needs(config, changed, stage, device) <= room)
    remedy = next(fits, "no setting of activations is enough: divide the model over more ranks, or take a smaller one")
    kept = need.activations + need.logits
    raise UserError(
        f"pretrain.micro_batch_tokens: {layout.micro_batch_tokens} tokens at once take {need.gpu / GIGA:.3g} GB of a"
        f" rank's memory ({kept / GIGA:.3g} GB of them activations), which has {room / GIGA:.3g} GB; {remedy}"
    )


def _needs(config: PretrainConfig, layout: Layout, stage: int, device: str) -> float:
    return stage_memory(config, layout, stage, device).gpu


def _thriftier(config: PretrainConfig, layout: Layout) -> Iterator[tuple[Layout, str]]:
    """Layouts that keep less, the least change first, and how to ask for them."""
    smaller = layout
    while smaller.micro_batch_tokens > config.context_length and smaller.micro_batch_tokens % 2 == 0:
        smaller = replace(smaller, micro_batch_tokens=smaller.micro_batch_tokens // 2)
        yield smaller, f"pretrain.micro_batch_tokens={smaller.micro_batch_tokens} fits"
    for switches in ACTIVATION_SWITCHES[1:]:
        wanted = ", ".join(f"pretrain.{name}={_value(value)}" for name, value in switches.items() if value)
        yield (
            replace(smaller, **switches),
            f"with pretrain.micro_batch_tokens={smaller.micro_batch_tokens}, {wanted} fits",
        )


def _value(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value).lower()
