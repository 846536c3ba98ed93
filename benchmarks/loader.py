"""What the data loader costs: its share of a training step, both measured in turn in one run.

The loader does what a rank does: range reads of token shards from an S3 server, digests, a mixture of domains, packing,
positions to resume from, all in a thread beside the steps, then the ledger and micro-batches. Reading all blocks of the
corpus is measured once and counted for as many steps as the corpus has. The step is our own forward and backward in
bfloat16 without the optimizer, so the share is overstated; time is this process's CPU time, all threads.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _table import Row, row, run

from k2.config.model import ModelConfig
from k2.config.pretrain import DataConfig
from k2.data.ledger import Ledger
from k2.data.loader import IGNORE, TokenLoader
from k2.data.mixture import Mixture
from k2.data.prefetch import Prefetch
from k2.data.shards import INDEX, write_shards
from k2.data.streaming import ArtifactFiles, ShardedCorpus, stream
from k2.model.transformer import Transformer
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import Store
from k2.store.embedded import embedded_server
from k2.store.lease import Lease
from k2.store.work import WorkArea
from k2.training.batches import TokenBatch, micro_batches

SHAPES = Path(__file__).with_name("shapes.yaml")
DOMAINS = ("code", "knowledge", "math", "web")
CORPUS_TOKENS, DOCUMENT_TOKENS = 4_000_000, 400
"""The second is a mean; documents are of uneven length."""
APART = 64
"""Tokens between those that are asked for to have every block read."""
STEPS = 10
"""Of a round: batches are made ahead a few at a time."""


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, all threads together."""
    start = time.process_time()
    work()
    return time.process_time() - start


def tokenized(store: Store, vocab_size: int, key: str) -> Artifact:
    """Random documents of all domains, in four shards each."""
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / DOCUMENT_TOKENS, size=CORPUS_TOKENS // DOCUMENT_TOKENS)
    documents = (
        (DOMAINS[i % 4], random.integers(vocab_size, size=length).tolist()) for i, length in enumerate(lengths)
    )
    with Lease(store, f"work/{key}/lease.json") as lease:
        writer = ArtifactWriter(store, "tokenize", key, WorkArea(store, key, lease))
        write_shards(documents, vocab_size, writer.path(f"train/{INDEX}").parent, CORPUS_TOKENS // 16)
        return writer.publish()


def corpora_of(artifact: Artifact) -> dict[str, ShardedCorpus]:
    """What `pretrain` reads from."""
    files = ArtifactFiles(artifact, "train", 0.0)
    return stream(json.loads(files.read(INDEX)), files, 1 << 30)


def measure(name: str, shape: dict[str, Any], rounds: int, store: Store) -> Row:
    """The share of one shape; its spread is that of the rounds."""
    config = ModelConfig(**shape["model"])
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0)
    corpora, ledger = corpora_of(tokenized(store, config.vocab_size, name)), Ledger()
    reading = cpu_seconds(lambda: [each.read(np.arange(0, each.tokens, APART)) for each in corpora.values()])
    reading *= shape["batch"] * shape["length"] / sum(each.tokens for each in corpora.values())
    loaders = {domain: TokenLoader(corpus, 0, shape["length"], 0) for domain, corpus in corpora.items()}
    mixture = Mixture(loaders, dict.fromkeys(corpora, 1.0), shape["batch"])

    def load() -> TokenBatch:
        batch = loader.next_batch()
        ledger.add(loader.read)
        return micro_batches(batch.tokens_BL, batch.targets_BL, shape["batch"], batch.document_BL)[0]

    def step(rows: TokenBatch) -> None:
        model.zero_grad()
        hidden, _ = model(rows.tokens_BL, documents_BL=rows.documents_BL)
        torch.autograd.backward(model.loss(hidden, rows.targets_BL.clamp(min=0), rows.targets_BL != IGNORE))

    with Prefetch(mixture, DataConfig().prefetch_steps) as loader:
        step(load())
        shares = [share(load, step, reading) for _ in range(rounds)]
    return row(f"data loader from an S3 server, {name} shape", "training step without optimizer", shares, 0.02, "lower")


def share(load: Callable[[], TokenBatch], step: Callable[[TokenBatch], None], reading: float) -> float:
    """CPU time of the thread that makes batches ahead and of taking them, over that of everything else."""
    ahead = next(thread for thread in threading.enumerate() if thread.name.startswith("prefetch"))
    clock = time.pthread_getcpuclockid(ahead.ident or 0)
    made, taking = time.clock_gettime(clock), 0.0

    def steps() -> None:
        nonlocal taking
        for _ in range(STEPS):
            start = time.thread_time()
            rows = load()
            taking += time.thread_time() - start
            step(rows)

    everything = cpu_seconds(steps)
    loading = taking + time.clock_gettime(clock) - made
    return (loading + STEPS * reading) / (everything - loading)


def rows(rounds: int) -> Iterator[Row]:
    """One row per shape."""
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as server:
        os.environ |= {**server.environment(), "K2_HOME": folder, "K2_S3_PREFIX": "bench"}
        store = Store.from_environment()
        for name, shape in yaml.safe_load(SHAPES.read_text()).items():
            yield measure(name, shape, rounds, store)


if __name__ == "__main__":
    run(__doc__, rows, 9)
