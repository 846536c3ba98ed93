"""Planned memory against what the allocator says of real steps, by component and switch; and constants of the engine.

Nothing here is fitted: rows of `k2.planner.layers` describe the code, and a row that does not shows up as a miss.
"""

from collections.abc import Iterator
from ctypes import c_long
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch

from k2.config.load import load_config
from k2.config.pretrain import PretrainConfig
from k2.distributed.zero import BUCKET_VALUES
from k2.kernels.cpu import PARTIAL_ROWS, spare
from k2.kernels.cpu.build import library
from k2.kernels.cpu.gemm import PANEL
from k2.model.loss import KEPT_VALUES
from k2.optim.newton_schulz import CHUNK_BYTES
from k2.planner import activations, layers, memory, operations
from k2.planner.layout import PUBLISHED_RECOMPUTE, Layout, default_layout
from k2.planner.memory import Memory, stage_memory
from k2.planner.operations import Sizes
from k2.training.footprint import Footprint, measure, tracked

EVERYTHING = {
    "recompute": (*PUBLISHED_RECOMPUTE, "mlp_up_projections"),
    "fp8_storage": True,
    "offload_activations": True,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "norms": {"recompute": ("norms",)},
    "mla_up_projections": {"recompute": ("mla_up_projections",)},
    "attention_probabilities": {"recompute": ("attention_probabilities",)},
    "mlp_up_projections": {"recompute": ("mlp_up_projections",)},
    "layers": {"recompute": ("layers",)},
    "fp8_storage": {"fp8_storage": True},
    "offload_activations": {"offload_activations": True},
    "Kimi K2's list": {"recompute": PUBLISHED_RECOMPUTE},
    "Kimi K2's list and FP8": {"recompute": PUBLISHED_RECOMPUTE, "fp8_storage": True},
    "Kimi K2's": {"recompute": PUBLISHED_RECOMPUTE, "fp8_storage": True, "offload_activations": True},
    "everything": EVERYTHING,
    "everything, bfloat16 weights": EVERYTHING | {"param_dtype": "bfloat16"},
    "layers, offloaded": {"recompute": ("layers",), "offload_activations": True},
    "bfloat16 weights": {"param_dtype": "bfloat16"},
    "layers, bfloat16 weights": {"param_dtype": "bfloat16", "recompute": ("layers",)},
    "mask_documents": {"mask_documents": True},
}


def planned(config: PretrainConfig, tokens: int) -> Memory:
    return stage_memory(config, replace(default_layout(config), micro_batch_tokens=tokens), 0, "cpu")


def off(plan: Memory, found: Footprint) -> Iterator[tuple[str, float, float]]:
    """Components that are planned and measured more than 5% apart."""
    pairs = {
        name: (getattr(plan, name), getattr(found, name)) for name in ("parameters", "gradients", "optimizer", "host")
    }
    pairs |= {"activations": (plan.activations + plan.logits, found.activations), "total": (plan.gpu, found.total)}
    for name, (ours, theirs) in pairs.items():
        if ours != pytest.approx(theirs, rel=0.05):
            yield name, ours, theirs


def of(preset: str, tokens: int, **changes: Any) -> PretrainConfig:
    return load_config(preset).pretrain.model_copy(update={"batch_tokens": tokens, **changes})


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_tiny_takes_what_is_planned(switches: dict[str, Any]) -> None:
    """A step of two micro-batches, and one of one, whose gradients come while its activations go."""
    for count in (1, 2):
        config = of("tiny", 2048 * count, **switches)
        assert not list(off(planned(config, 2048), measure(config, 2048)))


@pytest.mark.parametrize("name", ["none", "layers", "offload_activations", "Kimi K2's", "everything, bfloat16 weights"])
def test_layers_of_small_take_what_is_planned(name: str) -> None:
    """Two of its layers, a small head: the peak is in a layer. The benchmark has the whole model."""
    model = load_config("small").pretrain.model
    model = model.model_copy(update={"num_hidden_layers": 2, "vocab_size": 64, "n_routed_experts": 8})
    config = of("small", 512, context_length=512, model=model, **SWITCHES[name])
    assert not list(off(planned(config, 512), measure(config, 512, update=False)))


def test_the_head_of_small_takes_what_is_planned() -> None:
    """Over two layers and four rows of 256 tokens: the peak is in the loss. The benchmark has the whole model."""
    model = load_config("small").pretrain.model.model_copy(update={"num_hidden_layers": 2})
    config = of("small", 1024, context_length=256, model=model)
    found = measure(config, 1024, update=False)
    assert found.peak == "loss's gradient"
    assert not list(off(planned(config, 1024), found))


@pytest.mark.parametrize("chunks", [2, 3])
def test_a_loss_in_chunks_takes_what_is_planned(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 2048 * 1024 // chunks + 1024
    monkeypatch.setattr("k2.model.loss.KEPT_VALUES", kept)
    monkeypatch.setattr("k2.planner.activations.KEPT_LOGITS", kept)
    config = of("tiny", 4096, recompute=("layers",))
    assert not list(off(planned(config, 2048), measure(config, 2048)))


@pytest.mark.parametrize(
    ("switches", "peak"),
    [
        ({}, "loss's gradient"),
        ({"offload_activations": True}, "backward of layer 2"),
        ({"fp8_storage": True}, "backward of layer 2"),
        ({"recompute": PUBLISHED_RECOMPUTE, "fp8_storage": True}, "forward of layer 2"),
    ],
)
def test_the_plan_knows_when_a_step_takes_most(switches: dict[str, Any], peak: str) -> None:
    config = of("tiny", 4096, **switches)
    assert (planned(config, 2048).peak.split(":")[0], measure(config, 2048).peak) == (peak, peak)


def test_torchs_memory_tracker_agrees() -> None:
    """It follows tensors, not the allocator: what operators take for themselves is missing."""
    config = of("tiny", 4096)
    assert planned(config, 2048).gpu == pytest.approx(tracked(config, 2048), rel=0.05)


def test_constants_are_those_of_the_engine() -> None:
    assert operations.PANEL == PANEL
    assert operations.LEFT_BYTES == spare.SMALLEST
    assert layers.NORM_ROWS == PARTIAL_ROWS
    assert activations.KEPT_LOGITS == KEPT_VALUES
    assert memory.BUCKET_VALUES == BUCKET_VALUES
    assert memory.NEWTON_SCHULZ_BYTES == CHUNK_BYTES


@pytest.mark.parametrize("context", [1, 47, 256, 2049])
def test_threads_own_memory_is_that_of_the_engine(context: int) -> None:
    """For attention, for a gated MLP, and for experts with the mean number of rows."""
    config = load_config("small").pretrain.model_copy(update={"context_length": context})
    sizes = Sizes.of(config, Layout(micro_batch_tokens=context), cpu=True)
    model, kernels = config.model, library()
    assert kernels is not None
    attention = kernels.causal_scratch(context, model.qk_head_dim, model.v_head_dim)
    assert layers.causal_scratch(sizes) == pytest.approx(2 * attention, rel=0.01)
    assert kernels.gated_mlp_scratch(1) == 6 * layers.MLP_BLOCK
    rows = ceil(context * model.num_experts_per_tok / model.n_routed_experts)
    offsets = torch.tensor([0, rows])
    widths = c_long(offsets.data_ptr()), 1, model.hidden_size, model.moe_intermediate_size
    for backward in (False, True):
        experts = kernels.experts_scratch(*widths, backward)
        assert layers.experts_scratch(sizes, backward) == pytest.approx(2 * experts, rel=0.01)
