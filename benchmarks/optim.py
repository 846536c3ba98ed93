"""MuonClip's step against torch's optimizers over the same weights, both sides interleaved in one run.

Prints one JSON row per claim. With one thread, time is this process's CPU time, so that a busy machine spreads the
ratios less; with more it is wall time, which needs an idle machine.
"""

import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _table import Row, row, run
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.model.hf import part
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.newton_schulz import EPS, orthogonalize
from k2.optim.partition import partition
from k2.optim.qk_clip import QKClip
from k2.optim.schemes import SCHEMES
from k2.training.batches import NextTokenLoss, micro_batches
from k2.training.loop import train_step
from k2.training.state import TrainState

SHAPES = Path(__file__).with_name("shapes.yaml")
LR = 1e-3
PUBLISHED = SCHEMES["moonlight"].polynomials[0]
Step = Callable[[], object]


def seconds(step: Step) -> float:
    """Time of one call: CPU time of one thread, or wall time of several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def ratios(numerator: Step, denominator: Step, rounds: int) -> list[float]:
    """Quotients of time, both sides in turn, ascending; the first round warms up."""
    found = [seconds(numerator) / seconds(denominator) for _ in range(rounds + 1)]
    return sorted(found[1:])


def model_with_gradients(config: ModelConfig) -> Transformer:
    """Random weights and random gradients."""
    model = Transformer(config).initialize(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def own_step(config: ModelConfig, **changes: Any) -> Step:
    """One MuonClip step."""
    model = model_with_gradients(config)
    return MuonClip(model.named_parameters(), logical_tensors(config), OptimizerConfig(**changes), lr=LR).step


def torch_step(config: ModelConfig) -> Step:
    """torch.optim.Muon over every logical matrix alone, fused AdamW for the rest."""
    model = model_with_gradients(config)
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": [], "none": []}
    for tensor in logical_tensors(config):
        whole = model.state_dict()[tensor.parameter]
        single = nn.Parameter(part(whole, tensor).clone())
        single.grad = torch.randn_like(single)
        groups[tensor.group].append(single)
    muon = torch.optim.Muon(groups["muon"], lr=LR, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups["adamw"], lr=LR, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def product_floor(config: ModelConfig) -> Step:
    """As many multiplications as MuonClip's Newton-Schulz makes, in products of the best shape (1024 cubed)."""
    blocks = partition(logical_tensors(config), shapes_of(config)).blocks
    scheme = SCHEMES[OptimizerConfig().newton_schulz]
    count = sum(block.count * scheme.multiplications(block.shape) for block in blocks)
    left, right, out = (torch.randn(1024, 1024).bfloat16() for _ in range(3))

    def step() -> None:
        for _ in range(round(count / 1024**3)):
            torch.mm(left, right, out=out)

    return step


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trained parameters."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def adamw_step(config: ModelConfig) -> Step:
    """Fused AdamW over all weights."""
    return torch.optim.AdamW(model_with_gradients(config).parameters(), lr=LR, fused=True).step


def training_step(config: ModelConfig, batch: int, length: int) -> Step:
    """A whole training step in bfloat16."""
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0)
    state = TrainState(model, MuonClip(model.named_parameters(), logical_tensors(config), OptimizerConfig()))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch, length + 1))
    batches = micro_batches(tokens[:, :-1], tokens[:, 1:], batch)
    return lambda: train_step(state, batches, NextTokenLoss(), lambda _: LR)


def clip_work(config: ModelConfig, batch: int, length: int) -> Step:
    """What QK-Clip adds to a step: each head's maximum of its rows' ones, which softmax needs anyway; clipping all."""
    row_max_BHL = torch.randn(batch, config.num_attention_heads, length)
    weights: dict[str, Tensor] = dict(Transformer(config).initialize(0).named_parameters())
    clip = QKClip(logical_tensors(config), tau=100.0)

    def step() -> None:
        maxima = [row_max_BHL.amax((0, 2)) for _ in range(config.num_hidden_layers)]
        clip.observe(torch.stack(maxima) + 1000.0)
        clip.apply(weights)

    return step


def orthogonality_error(count: int, rows: int, columns: int, decay: float) -> list[float]:
    """Mean distance of singular values from one, ours divided by torch's, over batches with the given spectrum."""
    found = []
    scheme = SCHEMES[OptimizerConfig().newton_schulz]
    for seed in range(5):
        random = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
        u, s, v = torch.linalg.svd(random, full_matrices=False)
        batch = (u * (s * torch.logspace(0, -decay, s.shape[1]))[:, None]) @ v
        theirs = torch.stack([_zeropower_via_newtonschulz(matrix, PUBLISHED, 5, EPS) for matrix in batch])
        errors = [
            (torch.linalg.svdvals(o.double()) - 1).abs().mean().item() for o in (orthogonalize(batch, scheme), theirs)
        ]
        found.append(errors[0] / errors[1])
    return sorted(found)


def measure(rounds: int) -> Iterator[Row]:
    """All claims about the optimizer."""
    shape = yaml.safe_load(SHAPES.read_text())["reference"]
    config, batch, length = ModelConfig(**shape["model"]), shape["batch"], shape["length"]
    peer = "torch.optim.Muon looped over the logical matrices + fused AdamW"
    muon = own_step(config)
    peer_step, floor = torch_step(config), product_floor(config)
    yield row("MuonClip step, reference shape", peer, ratios(peer_step, muon, rounds), 3.0, "higher")
    published = own_step(config, newton_schulz="moonlight")
    yield row("MuonClip step, Moonlight's iterations", peer, ratios(peer_step, published, rounds), None, "higher")
    bound = "bound: its multiplications alone, at the speed of a 1024-cube product"
    yield row(bound, peer, ratios(peer_step, floor, rounds), None, "higher")
    yield row("MuonClip step, reference shape", "the same bound", ratios(muon, floor, rounds), None, "lower")
    single = own_step(config, newton_schulz_bf16=False)
    yield row("MuonClip step, float32 Newton-Schulz", "MuonClip step", ratios(single, muon, rounds), None, "lower")
    adamw = adamw_step(config)
    yield row("MuonClip step, reference shape", "fused AdamW step", ratios(muon, adamw, rounds), None, "lower")
    whole = training_step(config, batch, length)
    yield row("MuonClip step, share of a training step", "training step", ratios(muon, whole, rounds), None, "lower")
    clip = clip_work(config, batch, length)
    claim = "QK-Clip with statistics, share of a training step"
    yield row(claim, "training step", ratios(clip, whole, rounds), 0.01, "lower")
    for (rows, columns), decay in product(((128, 256), (256, 1024), (96, 256), (256, 192)), (0, 2, 4)):
        errors = orthogonality_error(8, rows, columns, decay)
        claim = f"orthogonality error, {rows}x{columns}, random times a decay of 1e-{decay}"
        yield row(claim, "torch.optim.Muon", errors, 1.0, "lower")


if __name__ == "__main__":
    run(__doc__, measure, 9)
