"""Sharded checkpoints: save and load against copying the same bytes, and how long training stops for one.

Everything goes through the embedded S3 server. The copy sends and fetches objects of the same sizes over as many
connections as a checkpoint uses, without digests of its own. A step is a whole one, optimizer included; times are wall
times, because the server is another process.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _table import Row, row, run

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.data.loader import ArrayCorpus, TokenLoader
from k2.distributed.checkpoint import CONNECTIONS, Checkpoints
from k2.distributed.objects import Objects
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.store.client import Store
from k2.store.embedded import embedded_server
from k2.store.lease import Lease
from k2.store.work import WorkArea
from k2.training.batches import NextTokenLoss, TokenBatch, micro_batches
from k2.training.loop import train_step
from k2.training.state import TrainState

SHAPES = Path(__file__).with_name("shapes.yaml")


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Batches:
    """The micro-batches of a step, from random tokens."""

    def __init__(self, shape: dict[str, Any], vocab_size: int) -> None:
        tokens = np.random.default_rng(0).integers(vocab_size, size=200_000, dtype=np.uint16)
        self.loader = TokenLoader(ArrayCorpus(tokens, np.arange(0, 200_001, 1000)), shape["batch"], shape["length"], 0)
        self.state_dict, self.load_state_dict = self.loader.state_dict, self.loader.load_state_dict

    def next_step(self) -> list[TokenBatch]:
        batch = self.loader.next_batch()
        return list(micro_batches(batch.tokens_BL, batch.targets_BL, len(batch.tokens_BL), batch.document_BL))


def start(shape: dict[str, Any]) -> tuple[TrainState, Batches]:
    """A run after its first step."""
    config = ModelConfig(**shape["model"])
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0)
    optimizer = MuonClip(model.named_parameters(), logical_tensors(config), OptimizerConfig())
    state, batches = TrainState(model, optimizer), Batches(shape, config.vocab_size)
    step(state, batches)
    return state, batches


def step(state: TrainState, batches: Batches) -> None:
    """One whole step."""
    train_step(state, batches.next_step(), NextTokenLoss(), lambda tokens: 1e-3)


def copy_row(name: str, store: Store, work: WorkArea, state: TrainState, batches: Batches, rounds: int) -> Row:
    """Throughput of save and load over that of the copy; both in turn."""
    checkpoints = Checkpoints(work, 1)
    checkpoints.save(state, batches)
    objects = Objects(store, work.base)
    data = [objects.get(digest) for digest in objects.digests()]
    names = [f"copy/{number}" for number in range(len(data))]

    def copy() -> None:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(store.put, names, data))
            list(pool.map(store.get, names))

    def save_and_load() -> None:
        state.step += 1
        checkpoints.save(state, batches)
        checkpoints.restore(state, batches)

    copy()
    ratios = [seconds(copy) / seconds(save_and_load) for _ in range(rounds)]
    megabytes = sum(map(len, data)) / 1e6
    claim = f"checkpoint save + load, {name} shape, {megabytes:.0f} MB"
    # A few MB take as long as a few requests do, of which the copy makes a third.
    return row(claim, "copy to and from the store", ratios, 0.7 if megabytes > 10 else None)


def stall_rows(name: str, work: WorkArea, state: TrainState, batches: Batches, rounds: int) -> Iterator[Row]:
    """How long training stops for a save, and how much longer the step beside the upload takes."""
    checkpoints = Checkpoints(work, 1)
    checkpoints.save(state, batches)
    stalls, beside = [], []
    for _ in range(rounds):
        alone = seconds(lambda: step(state, batches))
        stalls.append(seconds(lambda: checkpoints.step(state, batches)) / alone)
        beside.append(seconds(lambda: step(state, batches)) / alone - 1)
        checkpoints.wait()
    yield row(f"stall of an asynchronous save, {name} shape", "training step", stalls, 0.05, "lower")
    yield row(f"step beside the upload, {name} shape, longer by", "training step", beside, None, "lower")


def rows(rounds: int) -> Iterator[Row]:
    """Three rows per shape."""
    with tempfile.TemporaryDirectory() as home, embedded_server(Path(home)) as server:
        os.environ |= server.environment() | {"K2_S3_PREFIX": "bench"}
        store = Store.from_environment()
        for name, shape in yaml.safe_load(SHAPES.read_text()).items():
            state, batches = start(shape)
            with Lease(store, f"work/{name}/lease.json") as lease:
                work = WorkArea(store, name, lease)
                yield copy_row(name, store, work, state, batches, rounds)
                yield from stall_rows(name, work, state, batches, rounds)


if __name__ == "__main__":
    run(__doc__, rows, 7)
