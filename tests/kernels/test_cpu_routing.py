"""Choice of experts and order of rows in C: exactly what torch's operators give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from k2.kernels.cpu.build import library
from k2.kernels.cpu.routing import choose_experts
from k2.model.backend import use_kernels
from k2.model.experts import Blocks, arrange

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C compiler")
SIZES = {"tokens": st.integers(1, 40), "experts": st.integers(1, 70), "choices": st.integers(1, 8)}


@given(**SIZES)
def test_the_best_experts_come_first(tokens: int, experts: int, choices: int) -> None:
    choices, generator = min(choices, experts), torch.Generator().manual_seed(tokens)
    scores_TE = torch.rand(tokens, experts, generator=generator)
    bias_E = torch.randn(experts, generator=generator)
    expected = (scores_TE + bias_E).sort(dim=-1, descending=True, stable=True).indices[:, :choices]
    assert torch.equal(choose_experts(scores_TE, bias_E, choices), expected)


def test_lower_numbers_come_first_among_equals() -> None:
    scores_TE = torch.zeros(3, 40)
    scores_TE[:, 35] = scores_TE[:, 17] = 1.0
    assert choose_experts(scores_TE, torch.zeros(40), 4).tolist() == [[17, 35, 0, 1]] * 3


def test_no_number_is_no_crash() -> None:
    """A step with such scores is skipped later, for its gradient."""
    chosen_TS = choose_experts(torch.full((2, 20), torch.nan), torch.zeros(20), 3)
    assert ((chosen_TS >= 0) & (chosen_TS < 20)).all()


@given(**SIZES)
def test_rows_are_ordered_by_expert(tokens: int, experts: int, choices: int) -> None:
    chosen_TS = torch.randint(experts, (tokens, choices), generator=torch.Generator().manual_seed(tokens))
    found = arrange(chosen_TS, experts)
    use_kernels("torch")
    try:
        expected = arrange(chosen_TS, experts)
    finally:
        use_kernels("auto")
    assert _parts(found) == _parts(expected)


def _parts(blocks: Blocks) -> list[object]:
    tensors: tuple[Tensor, ...] = (blocks.slots_TS, blocks.source_N, blocks.tokens_N, blocks.offsets)
    return [tensor.tolist() for tensor in tensors]
