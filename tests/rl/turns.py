"""Peaks of memory, in MB above the interpreter's: training alone, inference's turn, training that takes turns with it.

`MALLOC_MMAP_THRESHOLD_` has to be set, so that freed memory leaves the process at once.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.model.layout import logical_tensors
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.rl.policy import Policy
from k2.training.batches import NextTokenLoss, TokenBatch, micro_batches
from k2.training.loop import train_step
from k2.training.state import TrainState

SHAPE = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=1024,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=2,
)


def memory(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1e3


def peak(work: Callable[[], object]) -> float:
    """Most memory while something works."""
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return memory("VmHWM") - START


def step(state: TrainState) -> None:
    tokens_BL = torch.arange(2 * 32).view(2, 32)
    batches: list[TokenBatch] = list(micro_batches(tokens_BL.numpy(), tokens_BL.numpy(), 2))
    train_step(state, batches, NextTokenLoss(), lambda _: 1e-3)


def turn(policy: Policy) -> None:
    with policy.turn() as engine:
        engine.generate([[1, 2, 3]], 2, SamplingConfig(4))


if __name__ == "__main__":
    torch.set_num_threads(1)
    START = memory("VmRSS")
    model = Transformer(SHAPE).initialize(0)
    state = TrainState(model, MuonClip(model.named_parameters(), logical_tensors(SHAPE), OptimizerConfig()))
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
    alone = peak(lambda: step(state))
    held = memory("VmRSS") - START
    policy = Policy(state)
    turns = peak(lambda: turn(policy))
    beside = peak(lambda: step(state))
    print(json.dumps({"weights": size, "alone": alone, "held": held, "turn": turns, "beside": beside}))
