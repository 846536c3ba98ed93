"""What the data loader costs: its share of a training step, both measured in turn in one run.

The loader does what a rank does: range reads of token shards from an S3 server, digests, a mixture of domains, packing
and the ledger. Reading all blocks of the corpus is measured once and counted for as many steps as the corpus has. The
step is our own forward and backward in bfloat16 without the optimizer, so the share is overstated; time is this
process's CPU time, all threads.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _table import Row, row, run

from k2.config.model import ModelConfig
from k2.data.ledger import Ledger
from k2.data.loader import IGNORE, TokenLoader
from k2.data.mixture import Mixture
from k2.data.shards import INDEX, write_shards
from k2.data.streaming import ArtifactFiles, ShardedCorpus, stream
from k2.model.transformer import Transformer
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import Store
from k2.store.embedded import embedded_server
from k2.store.lease import Lease
from k2.store.work import WorkArea

SHAPES = Path(__file__).with_name("shapes.yaml")
DOMAINS = ("code", "knowledge", "math", "web")
CORPUS_TOKENS, DOCUMENT_TOKENS = 4_000_000, 400
"""The second is a mean; documents are of uneven length."""


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
    step_tokens = shape["batch"] * shape["length"]
    corpora, ledger = corpora_of(tokenized(store, config.vocab_size, name)), Ledger()
    reading = cpu_seconds(lambda: [each.read(np.arange(each.tokens)) for each in corpora.values()])
    reading *= step_tokens / sum(each.tokens for each in corpora.values())
    loaders = {domain: TokenLoader(corpus, 0, shape["length"], 0) for domain, corpus in corpora.items()}
    loader = Mixture(loaders, dict.fromkeys(corpora, 1.0), shape["batch"])
    batch = loader.next_batch()
    tokens, targets = torch.from_numpy(batch.tokens_BL), torch.from_numpy(batch.targets_BL)
    documents, counted = torch.from_numpy(batch.document_BL), targets != IGNORE

    def step() -> None:
        model.zero_grad()
        hidden, _ = model(tokens, documents_BL=documents)
        torch.autograd.backward(model.loss(hidden, targets.clamp(min=0), counted))

    def load() -> None:
        loader.next_batch()
        ledger.add(loader.read)

    step()
    shares = [(reading + cpu_seconds(load)) / cpu_seconds(step) for _ in range(rounds)]
    return row(f"data loader from an S3 server, {name} shape", "training step without optimizer", shares, 0.02, "lower")


def rows(rounds: int) -> Iterator[Row]:
    """One row per shape."""
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as server:
        os.environ |= {**server.environment(), "K2_HOME": folder, "K2_S3_PREFIX": "bench"}
        store = Store.from_environment()
        for name, shape in yaml.safe_load(SHAPES.read_text()).items():
            yield measure(name, shape, rounds, store)


if __name__ == "__main__":
    run(__doc__, rows, 9)
