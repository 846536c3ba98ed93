"""The operations written for speed, against plain formulas: cut into many small blocks, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from k2.model.layers import GatedMLP, RMSNorm
from k2.model.rope import rotate
from tests.model.reference import TINY, build


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def agree(got: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients, the gradients weighted unequally."""
    torch.testing.assert_close(got, expected)
    weights = normal(*got.shape, seed=9).detach()
    found = torch.autograd.grad(got, inputs, weights)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, weights))


@pytest.mark.parametrize("values", [1, 40, 2**17])
def test_norm_and_gated_mlp_equal_their_formulas(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2.model.layers.BLOCK_VALUES", values)
    x = normal(2, 7, 6)
    norm, mlp = RMSNorm(6, 1e-3).double(), GatedMLP(6, 5).double()
    with torch.no_grad():
        for seed, parameter in enumerate([*norm.parameters(), *mlp.parameters()]):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    agree(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-3), [x, norm.weight])
    gate, up = F.linear(x, mlp.gate_up_proj.weight).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * up, mlp.down_proj.weight)
    agree(mlp(x), expected, [x, mlp.gate_up_proj.weight, mlp.down_proj.weight])


def test_rotation_equals_its_formula() -> None:
    x = normal(2, 3, 4, 7)[..., 1:]  # an odd offset, as an odd latent rank gives
    angles = normal(2, 3, 1, 3, seed=1).detach()
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    agree(rotate(x, torch.complex(cos, sin)), torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1), [x])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "value"), [("attention.QUERY_BLOCK", 4), ("experts.GROUP_ROWS", 1), ("experts.GROUP_ROWS", 9)]
)
def test_block_sizes_change_nothing(name: str, value: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(TINY.vocab_size, (2, 19), generator=torch.Generator().manual_seed(5))
    documents = torch.arange(19).expand(2, -1) // 7 if packed else None
    whole = run(tokens, documents)
    monkeypatch.setattr(f"k2.model.{name}", value)
    for got, expected in zip(run(tokens, documents), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def run(tokens: Tensor, documents: Tensor | None) -> list[Any]:
    """Hidden states, largest logits and all gradients."""
    model = build(TINY)
    hidden, statistics = model(tokens, documents_BL=documents)
    model.loss(hidden[:, :-1], tokens[:, 1:]).backward()
    return [hidden, statistics.max_logits_NH, *(parameter.grad for parameter in model.parameters())]
