"""How far the losses of several ranks are from those of one process, and how many tokens choose other experts.

Trains the preset `nano` over its whole schedule on one process and, by torchrun, on two ranks of every kind: in float32
throughout with the one process's choices of experts imposed, the same with free routers, and as it ships, in bfloat16.
The first says whether the ranks compute the same; the others what rounding becomes when it changes a choice.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _table import Row, row, run

from k2.config.load import load_config
from k2.config.pretrain import PretrainConfig
from k2.data.loader import ArrayCorpus
from k2.distributed.plan import DistributedPlan
from k2.distributed.replay import Choices, part_of
from k2.training.batches import NextTokenLoss
from k2.training.loop import ParallelPlan, train_step
from k2.training.pretraining import (
    PackedSource,
    build,
    join_ranks,
    mixture_of,
    model_config,
    reconfigure,
    schedule_of,
    segments,
)
from k2.training.state import TrainState

LAYOUTS = {"dp": {}, "ep": {"expert_parallel_size": 2}, "pp": {"pipeline_parallel_size": 2}}
MODES = {"float32 replayed": True, "float32 free": False, "bfloat16 free": False}
"""What is compared, and whether choices are imposed."""
TOKENS = 40_000


def config_of(layout: str, mode: str) -> PretrainConfig:
    """`nano` as it is, or in float32 with Newton-Schulz in it."""
    values: dict[str, Any] = {"parallel": LAYOUTS[layout]}
    if mode.startswith("float32"):
        values |= {"precision": "float32", "optimizer": {"newton_schulz_bf16": False}}
    return load_config("nano", {"pretrain": values}).pretrain


def corpus(vocab_size: int) -> ArrayCorpus:
    """Documents that a model can learn something from: steps of uneven length through the vocabulary."""
    steps = np.random.default_rng(0).choice([1, 2, 3, 30], size=TOKENS, p=[0.6, 0.2, 0.15, 0.05])
    return ArrayCorpus((np.cumsum(steps) % vocab_size).astype(np.uint16), np.arange(0, TOKENS + 1, 400), "steps")


def losses(config: PretrainConfig, state: TrainState, plan: ParallelPlan) -> list[float]:
    """Of all steps."""
    schedule, found = schedule_of(config), []
    source = PackedSource(mixture_of(config, {"steps": corpus(config.model.vocab_size)}, plan), config, plan.layout)
    for segment in segments(schedule, config.batch_tokens):
        reconfigure(state.model, model_config(config, segment.yarn))
        source.set_context_length(segment.context_length)
        while state.step < segment.until:
            loss_fn = NextTokenLoss(config.balance_loss_weight)
            found.append(train_step(state, source.next_step(), loss_fn, schedule.lr, plan).loss)
    source.ledger()
    return found


def alone(mode: str, folder: Path) -> list[float]:
    """The losses of one process; its choices stay in the folder."""
    config = config_of("dp", mode)
    state, plan = build(config)
    with Choices(state.model) as choices:
        found = losses(config, state, plan)
    torch.save(choices.seen(), folder / f"{mode}.pt")
    return found


def one_rank(layout: str, folder: Path) -> None:
    """What every process of torchrun does: train in every mode, and let the first one write what came out."""
    results = {}
    for mode, impose in MODES.items():
        config = config_of(layout, mode)
        mesh = join_ranks(config, {})
        state, plan = build(config, mesh)
        assert isinstance(plan, DistributedPlan), "under torchrun"
        expected = part_of(torch.load(folder / f"{mode}.pt"), config.steps, plan.data_rank, plan.layout.data_parallel)
        with Choices(state.model, expected, impose) as choices:
            found = losses(config, state, plan)
        counts = torch.tensor([choices.flips, choices.tokens])
        plan.sum_([counts])
        results[mode] = {"losses": found, "flips": counts.tolist()}
    if dist.get_rank() == 0:
        (folder / f"{layout}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def rows(rounds: int) -> Iterator[Row]:
    """One row per layout and mode; `rounds` is not used, for every round gives the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = {mode: alone(mode, folder) for mode in MODES}
        for layout in LAYOUTS:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            environment = os.environ | {"K2_BENCH_RANK": f"{layout}:{folder}", "OMP_NUM_THREADS": "1"}
            subprocess.run([*torchrun, __file__], env=environment, check=True, stderr=subprocess.DEVNULL)
            for mode, found in json.loads((folder / f"{layout}.json").read_text()).items():
                deviations = [abs(a / b - 1) for a, b in zip(found["losses"], reference[mode], strict=True)]
                flips, tokens = found["flips"]
                claim = f"losses of nano on 2 ranks ({layout}), {mode}: {flips} of {tokens} choices flipped"
                yield {**row(claim, "one process", [max(deviations)], 1e-4 if MODES[mode] else None, "lower"),
                       "ratio": max(deviations), "last": deviations[-1], "flips": flips, "choices": tokens}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "K2_BENCH_RANK" in os.environ:
        one_rank(os.environ["K2_BENCH_RANK"].partition(":")[0], Path(os.environ["K2_BENCH_RANK"].partition(":")[2]))
    else:
        run(__doc__, rows, 1)
