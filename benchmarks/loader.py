"""What the data loader costs: its share of a training step, both measured in turn in one run.

Prints one JSON row per shape. The step is our own forward and backward in bfloat16 without the optimizer,
so the share is overstated; time is this process's CPU time.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _table import Row, row, run

from k2.config.model import ModelConfig
from k2.data.loader import IGNORE, TokenLoader
from k2.model.transformer import Transformer

SHAPES = Path(__file__).with_name("shapes.yaml")
CORPUS_TOKENS = 4_000_000
CORPUS_DOCUMENTS = 10_000


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, all threads together."""
    start = time.process_time()
    work()
    return time.process_time() - start


def corpus(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random documents of uneven length."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(np.arange(1, CORPUS_TOKENS), CORPUS_DOCUMENTS - 1, replace=False))
    return rng.integers(vocab_size, size=CORPUS_TOKENS, dtype=np.uint16), np.concatenate([[0], ends, [CORPUS_TOKENS]])


def measure(name: str, shape: dict[str, Any], rounds: int) -> Row:
    """The share of one shape; its spread is that of the rounds."""
    config = ModelConfig(**shape["model"])
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0)
    loader = TokenLoader(*corpus(config.vocab_size), shape["batch"], shape["length"], seed=0)
    batch = loader.next_batch()
    tokens, targets = torch.from_numpy(batch.tokens_BL), torch.from_numpy(batch.targets_BL)
    documents, counted = torch.from_numpy(batch.document_BL), targets != IGNORE

    def step() -> None:
        model.zero_grad()
        hidden, _ = model(tokens, documents_BL=documents)
        torch.autograd.backward(model.loss(hidden, targets.clamp(min=0), counted))

    step()
    shares = [cpu_seconds(loader.next_batch) / cpu_seconds(step) for _ in range(rounds)]
    return row(f"data loader, {name} shape", "training step without optimizer", shares, 0.02, "lower")


def rows(rounds: int) -> Iterator[Row]:
    """One row per shape."""
    for name, shape in yaml.safe_load(SHAPES.read_text()).items():
        yield measure(name, shape, rounds)


if __name__ == "__main__":
    run(__doc__, rows, 9)
