"""What layers leave behind: the same gradients from less memory, FP8's error bounded, and nothing counted twice."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from k2.config.base import Kernels
from k2.config.model import ModelConfig, Recompute
from k2.kernels.cpu.gemm import has_gemm
from k2.kernels.fp8 import dequantize, quantize
from k2.model.activations import Activations
from k2.model.backend import use_kernels
from k2.model.offload import Offload
from k2.model.transformer import Transformer
from tests.model.reference import SHAPES

NAMES = get_args(Recompute)
SELECTIVE = tuple(name for name in NAMES if name != "layers")
WITHOUT_PROBABILITIES = tuple(name for name in SELECTIVE if name != "attention_probabilities")
PAPER = ("norms", "mla_up_projections")


def step(config: ModelConfig, dtype: torch.dtype, **switches: Any) -> tuple[dict[str, Tensor], Tensor, int]:
    """Gradients, expert counts, and the bytes a forward pass leaves behind where it is computed."""
    model = Transformer(config, compute_dtype=dtype, **switches).initialize(0)
    tokens = torch.randint(config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(5))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        hidden, statistics = model(tokens)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    away = model.offload.nbytes if model.offload else 0
    model.loss(hidden[:, :-1], tokens[:, 1:]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if model.offload:
        assert away > 0
        assert model.offload.nbytes == 0
    return gradients, statistics.expert_counts_ME, kept - away


@pytest.fixture
def kernels() -> Iterator[Callable[[Kernels], None]]:
    yield use_kernels
    use_kernels("auto")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("shape", "dtype"), [("plain", torch.bfloat16), ("full_query", torch.float32)])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("recompute", [(), *((name,) for name in NAMES), SELECTIVE, NAMES], ids="+".join)
def test_the_same_gradients_from_less_memory(kernels, recompute, offload: bool, shape: str, dtype: torch.dtype) -> None:
    kernels("torch" if recompute == ("attention_probabilities",) else "auto")  # C has none to drop
    gradients, counts, kept = step(SHAPES[shape], dtype)
    again, counts_again, kept_again = step(SHAPES[shape], dtype, recompute=recompute, offload_activations=offload)
    assert same(again, gradients)
    assert torch.equal(counts_again, counts)
    assert counts.sum(1).tolist() == [2 * 19 * SHAPES[shape].num_experts_per_tok] * 2
    assert kept_again < kept or not (recompute or offload)


@pytest.mark.skipif(not has_gemm(), reason="needs a C compiler and a processor with avx512_bf16")
def test_attention_in_c_has_no_probabilities_to_drop() -> None:
    plain, again = (
        step(SHAPES["plain"], torch.bfloat16, recompute=names) for names in ((), ("attention_probabilities",))
    )
    assert same(again[0], plain[0])
    assert again[2] == plain[2]


@pytest.mark.parametrize(("choice", "selective"), [("auto", WITHOUT_PROBABILITIES), ("torch", SELECTIVE)])
def test_every_switch_adds_to_the_saving(kernels, choice: Kernels, selective: tuple[Recompute, ...]) -> None:
    kernels(choice)
    switches: dict[str, Any] = {}
    kept = [step(SHAPES["plain"], torch.bfloat16)[2]]
    for added in (
        {"fp8_storage": True},
        *({"recompute": selective[:count]} for count in range(1, len(selective) + 1)),
        {"offload_activations": True},
    ):
        switches |= added
        kept.append(step(SHAPES["plain"], torch.bfloat16, **switches)[2])
    assert all(after < before for before, after in pairwise(kept)), kept


@pytest.mark.parametrize("recompute", [(), PAPER], ids="+".join)
def test_fp8_storage_changes_the_weights_gradients_by_its_rounding_only(recompute: tuple[str, ...]) -> None:
    exact, counts, _ = step(SHAPES["two_shared"], torch.float32, recompute=recompute)
    stored, counts_again, _ = step(SHAPES["two_shared"], torch.float32, recompute=recompute, fp8_storage=True)
    assert torch.equal(counts, counts_again)
    for name, gradient in exact.items():
        error = float((stored[name] - gradient).norm() / gradient.norm())
        # E4M3 rounds by at most 1/16 of a value; the terms of a router's gradient cancel, which leaves more of it.
        assert error < (0.1 if ".gate." in name else 1 / 16), name
        if name in ("lm_head.weight", "norm.weight", "layers.2.mlp.experts.down_proj"):
            assert (error < 1e-6) == (name != "layers.2.mlp.experts.down_proj"), name


def test_a_stored_tensor_comes_back_as_its_tiles_and_a_recomputed_one_exactly() -> None:
    weight = torch.randn(200, 200, requires_grad=True)
    x = torch.randn(3, 5, 200)
    memory = Activations()
    with memory.around([]):
        kept = memory.compress(x)
        y = kept.flatten(0, 1) @ weight
        z = (memory.call(torch.sigmoid, x) @ weight).sum()
    code, scale = quantize(x.flatten(0, 1))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    back = dequantize(code, scale, torch.float32)
    assert torch.equal(gradient, back.T @ torch.ones(15, 200))
    (gradient,) = torch.autograd.grad(z, weight)
    assert torch.equal(gradient, torch.sigmoid(dequantize(code, scale, torch.float32)).T @ torch.ones(15, 200))


@pytest.mark.parametrize(
    "switches",
    [{}, {"fp8_storage": True}, {"offload_activations": True}, {"fp8_storage": True, "offload_activations": True}],
    ids="+".join,
)
def test_a_graph_can_be_walked_twice(switches: dict[str, bool]) -> None:
    model = Transformer(SHAPES["plain"], recompute=SELECTIVE[:2], **switches).initialize(0)
    tokens = torch.arange(20).view(2, 10)
    loss = model.loss(model(tokens)[0], tokens)
    once, twice = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_two_passes_in_flight_keep_their_own() -> None:
    """As in 1F1B: a second micro-batch goes forward before the first one goes back."""
    model = Transformer(SHAPES["plain"], offload_activations=True, fp8_storage=True).initialize(0)
    batches = [torch.arange(20).view(2, 10), torch.arange(30, 50).view(2, 10)]
    alone = [torch.autograd.grad(model.loss(model(t)[0], t), list(model.parameters())) for t in batches]
    losses = [model.loss(model(tokens)[0], tokens) for tokens in batches]
    together = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert all(
        torch.equal(a, b) for one, two in zip(alone, together, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_nothing_is_left_on_the_host_without_gradients_or_after_a_graph_is_dropped() -> None:
    model = Transformer(SHAPES["plain"], offload_activations=True).initialize(0)
    with torch.no_grad():
        model(torch.arange(20).view(2, 10))
    assert model.offload is not None
    assert model.offload.nbytes == 0
    hidden, _ = model(torch.arange(20).view(2, 10))
    assert model.offload.nbytes > 0
    del hidden
    assert model.offload.nbytes == 0


def test_memory_that_tensors_share_is_copied_once_and_views_keep_their_places() -> None:
    weight = torch.randn(6, requires_grad=True)
    base = torch.arange(24.0)
    offload = Offload()
    memory = Activations(offload)
    with memory.around([weight]):
        result = (base.view(4, 6)[1:] * weight).sum() + (base[3:9] * weight).sum()
        result = result + (torch.view_as_complex(base.view(12, 2))[2:8].real * weight).sum()
    assert offload.nbytes == base.nbytes
    (gradient,) = torch.autograd.grad(result, weight)
    assert torch.equal(gradient, base.view(4, 6)[1:].sum(0) + base[3:9] + base.view(12, 2)[2:8, 0])
