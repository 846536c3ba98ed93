"""A small pretraining run, also as a program: `python small.py KEY` trains and prints a digest of what came out."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from k2.config.model import ModelConfig, RopeScaling
from k2.config.optimizer import OptimizerConfig
from k2.config.pretrain import PretrainConfig
from k2.data.loader import ArrayCorpus, TokenLoader
from k2.distributed.checkpoint import Checkpoints
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea
from k2.training.pretraining import build, pretrain
from k2.training.state import TrainState

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=16,
    initializer_range=0.1,
)
CONFIG = PretrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(tau=0.9, bias_update_speed=0.01),
    lr=0.02,
    warmup_tokens=256,
    stable_tokens=1024,
    decay_tokens=512,
    annealing_tokens=256,
    long_context_tokens=512,
    context_length=16,
    long_context_length=32,
    yarn=RopeScaling(factor=2.0, original_max_position_embeddings=16),
    batch_tokens=128,
    micro_batch_tokens=64,
    heldout_tokens=256,
    checkpoint_interval=2,
)


@contextmanager
def work_area(store: Store, key: str) -> Iterator[WorkArea]:
    """The work area of a key, while this holds its lease."""
    with Lease(store, f"work/{key}/lease.json") as lease:
        yield WorkArea(store, key, lease)


class NoProgress:
    """Says nothing."""

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        pass

    def event(self, kind: str, **values: Any) -> None:
        pass


def corpus(tokens: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that a model can learn something from, and document starts."""
    rng = np.random.default_rng(0)
    steps = rng.choice([1, 2, 3, 30], size=tokens, p=[0.6, 0.2, 0.15, 0.05])
    return (np.cumsum(steps) % 64).astype(np.uint16), np.arange(0, tokens + 1, 40)


def run(store: Store, key: str, config: PretrainConfig = CONFIG, progress: NoProgress | None = None) -> TrainState:
    """Pretrain on the corpus above, with checkpoints under a key."""
    tokens, offsets = corpus()
    rows = config.batch_tokens // config.context_length
    loader = TokenLoader(ArrayCorpus(tokens, offsets), rows, config.context_length, config.seed)
    state, plan = build(config)
    with work_area(store, key) as work, Checkpoints(work, config.checkpoint_interval) as checkpoints:
        pretrain(config, state, plan, loader, tokens[:400], checkpoints, progress or NoProgress())
    return state


def digest(state: TrainState) -> str:
    """SHA-256 over weights, optimizer state, curves and held-out losses."""
    found = hashlib.sha256()
    for _, tensor in sorted({**state.model.state_dict(), **state.optimizer.state_dict()}.items()):
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    found.update(json.dumps([state.history.curves(), state.notes, state.step, state.tokens], sort_keys=True).encode())
    return found.hexdigest()


if __name__ == "__main__":
    print(digest(run(Store.from_environment(), sys.argv[1])))
