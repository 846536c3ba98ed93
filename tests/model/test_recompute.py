"""Selective recomputation: the same bits from less memory, and nothing counted twice."""

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from k2.config.model import ModelConfig, Recompute
from k2.model.transformer import Transformer
from tests.model.reference import SHAPES

NAMES = get_args(Recompute)
SELECTIVE = tuple(name for name in NAMES if name != "layers")


def step(config: ModelConfig, recompute: tuple[Recompute, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Gradients in one row, expert counts, and the bytes a forward pass leaves behind."""
    model = Transformer(config, compute_dtype=dtype, recompute=recompute).initialize(0)
    tokens = torch.randint(config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(5))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        hidden, statistics = model(tokens)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    model.loss(hidden[:, :-1], tokens[:, 1:]).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    return gradients, statistics.expert_counts_ME, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["plain", "full_query"])
@pytest.mark.parametrize("recompute", [*((name,) for name in NAMES), SELECTIVE, NAMES], ids="+".join)
def test_the_same_gradients_from_less_memory(recompute, shape: str, dtype: torch.dtype) -> None:
    gradients, counts, kept = step(SHAPES[shape], (), dtype)
    again, counts_again, kept_again = step(SHAPES[shape], recompute, dtype)
    assert torch.equal(again, gradients)
    assert torch.equal(counts_again, counts)
    assert counts.sum(1).tolist() == [2 * 19 * SHAPES[shape].num_experts_per_tok] * 2
    assert kept_again < kept


def test_every_switch_adds_to_the_saving() -> None:
    kept = [step(SHAPES["plain"], SELECTIVE[:count], torch.bfloat16)[2] for count in range(len(SELECTIVE) + 1)]
    assert kept == sorted(set(kept), reverse=True)


def test_a_graph_can_be_walked_twice() -> None:
    model = Transformer(SHAPES["plain"], recompute=SELECTIVE).initialize(0)
    tokens = torch.arange(20).view(2, 10)
    loss = model.loss(model(tokens)[0], tokens)
    once, twice = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
