"""Memory of gradients from one step to the next: taken again, never while somebody has it, and changing no bit."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2.kernels.cpu import spare
from k2.kernels.cpu.gemm import has_gemm
from k2.model.transformer import Transformer
from k2.training.footprint import recorded
from tests.model.reference import TINY

LARGE = spare.SMALLEST // 4
"""Values of float32 in the smallest gradient that leaves its memory."""
HUGE = Path("/sys/kernel/mm/transparent_hugepage")
MODEL = TINY.model_copy(update={"vocab_size": 1400, "n_routed_experts": 24})
LEFT = ["layers.1.mlp.experts.gate_up_proj", "layers.2.mlp.experts.gate_up_proj", "lm_head.weight"]
"""Its gradients that are large enough; the embedding's is torch's."""

in_c = pytest.mark.skipif(not has_gemm(), reason="needs a C compiler and a processor with avx512_bf16")


@pytest.fixture(autouse=True)
def nothing_spare() -> Iterator[None]:
    yield
    with spare.left():
        pass


def gradient(values: int = LARGE) -> Tensor:
    return spare.empty((values,), torch.float32)


def left_by(work: Callable[[], None]) -> int:
    """Bytes that work took from the allocator and did not give back."""
    _, recording = recorded(work)
    return sum(block.bytes for block in recording.alive(float("inf")))


def test_what_ends_inside_is_taken_again_by_its_size() -> None:
    first, other = gradient(), gradient(2 * LARGE)
    place, wide_place = first.data_ptr(), other.data_ptr()
    with spare.left():
        del first, other
    elsewhere = torch.empty(LARGE)  # would be there if it had been freed
    again, wide, second = spare.empty((2, LARGE), torch.bfloat16), gradient(2 * LARGE), gradient()
    assert (again.data_ptr(), wide.data_ptr()) == (place, wide_place)
    assert again.shape == (2, LARGE)
    assert again.dtype == torch.bfloat16
    assert second.data_ptr() not in (place, elsewhere.data_ptr())


@pytest.mark.skipif(not HUGE.exists(), reason="needs Linux with transparent huge pages")
def test_large_gradients_ask_for_large_pages() -> None:
    whole = gradient(4 * spare.LARGE_PAGE)
    middle = whole.data_ptr() + 2 * spare.LARGE_PAGE
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(place[1], 16) <= middle < int(place[2], 16)
        if inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("the gradient is in no mapping")


@pytest.mark.parametrize("part", [lambda whole: whole, lambda whole: whole[1:], lambda whole: whole.view(2, -1).T])
def test_nobody_s_gradient_is_taken(part: Callable[[Tensor], Tensor]) -> None:
    whole = gradient().fill_(3.0)
    held = part(whole)
    with spare.left():
        del whole
    for _ in range(2):
        others = [gradient().zero_() for _ in range(3)]
        assert (held == 3).all()
        with spare.left():
            others.clear()


def test_what_ends_elsewhere_is_freed_and_what_is_not_taken_too() -> None:
    def ends_outside() -> None:
        gradient()

    def ends_inside() -> None:
        kept = gradient()
        with spare.left():
            del kept

    def not_taken() -> None:
        ends_inside()
        with spare.left():
            pass

    assert left_by(ends_outside) == 0
    assert left_by(ends_inside) == spare.SMALLEST
    assert left_by(not_taken) == 0


def test_small_ones_are_ordinary() -> None:
    def ends_inside() -> None:
        kept = gradient(LARGE - 1)
        with spare.left():
            del kept

    assert left_by(ends_inside) == 0


def built() -> Transformer:
    return Transformer(MODEL, compute_dtype=torch.bfloat16).initialize(0)


def backward(model: Transformer, seed: int) -> None:
    """One micro-batch; some experts get no token."""
    tokens = torch.randint(MODEL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
    model.loss(model(tokens)[0][:, :-1], tokens[:, 1:]).backward()


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def places(model: Transformer) -> set[int]:
    """Where gradients lie that are to leave their memory."""
    found = gradients(model)
    assert [name for name, each in found.items() if each.nbytes >= spare.SMALLEST] == ["embed_tokens.weight", *LEFT]
    return {found[name].data_ptr() for name in LEFT}


@in_c
def test_a_model_s_next_gradients_lie_where_the_last_ones_did() -> None:
    model = built()
    backward(model, seed=1)
    before = places(model)
    model.zero_grad()
    elsewhere = [torch.empty_like(weight) for weight in model.parameters()]
    backward(model, seed=2)
    assert places(model) == before
    assert not before & {tensor.data_ptr() for tensor in elsewhere}


@in_c
def test_an_optimizer_that_forgets_them_frees_them() -> None:
    model = built()
    optimizer = torch.optim.SGD(model.parameters())

    def step() -> None:
        backward(model, seed=1)
        optimizer.zero_grad()

    def training_step() -> None:
        backward(model, seed=1)
        model.zero_grad()

    step()  # tables that are made once
    large = sum(weight.nbytes for name, weight in model.named_parameters() if name in LEFT)
    assert left_by(step) < spare.SMALLEST
    assert large <= left_by(training_step) < large + spare.SMALLEST


@in_c
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_after_another_has_the_gradients_of_a_first_one(micro_batches: int) -> None:
    """Whatever was in the memory, which nobody clears."""
    model, fresh = built(), built()
    for seed in range(micro_batches):
        backward(fresh, 2 + seed)
        backward(model, seed)
    for each in gradients(model).values():
        each.fill_(torch.nan)
    model.zero_grad()
    for seed in range(2, 2 + micro_batches):
        backward(model, seed)
    found, wanted = gradients(model), gradients(fresh)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(each.isnan().any() for each in found.values())
