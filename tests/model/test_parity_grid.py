"""Parity with transformers' DeepseekV3ForCausalLM over drawn shapes, seeds, positions, padding and packing.

The reference computes in float64. Ours must agree in float64 to 1e-9 and in float32 to 1e-4: logits, loss, and the
gradient of every parameter.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2.config.model import ModelConfig, RopeScaling
from k2.model.hf import part
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from tests.model.reference import SHAPES, build, build_reference, float64_reference, reference_tensors

EXAMPLES = settings(
    max_examples=80, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small models of every kind: odd sizes, one expert, groups, full or low-rank queries, YaRN or none."""
    layers = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    experts = groups * draw(st.integers(2, 5))  # the reference needs two in a group
    open_groups = draw(st.integers(1, groups))
    scaling = st.builds(
        RopeScaling,
        factor=st.sampled_from([1.0, 2.5, 32.0]),
        original_max_position_embeddings=st.sampled_from([16, 4096]),
        beta_fast=st.sampled_from([1.0, 32.0]),
        beta_slow=st.just(1.0),
        mscale=st.sampled_from([0.0, 0.707, 1.0]),
        mscale_all_dim=st.sampled_from([0.0, 1.0, 1.3]),
    )
    return ModelConfig(
        vocab_size=draw(st.integers(8, 70)),
        hidden_size=draw(st.integers(8, 37)),
        intermediate_size=draw(st.integers(8, 29)),
        moe_intermediate_size=draw(st.integers(8, 19)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_attention_heads=draw(st.integers(1, 5)),
        q_lora_rank=draw(st.none() | st.integers(1, 13)),
        kv_lora_rank=draw(st.integers(1, 13)),
        qk_nope_head_dim=draw(st.integers(1, 11)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 11)),
        n_routed_experts=experts,
        n_shared_experts=draw(st.integers(1, 2)),
        num_experts_per_tok=draw(st.integers(1, open_groups * experts // groups)),
        n_group=groups,
        topk_group=open_groups,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.none() | st.just(2.5)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
        rope_scaling=draw(st.none() | scaling),
        max_position_embeddings=131072,
        initializer_range=0.1,
    )


@dataclass(frozen=True)
class Batch:
    """Tokens and targets [B, L], which targets count, and what each side is told about positions and masks."""

    tokens: Tensor
    targets: Tensor
    counted: Tensor
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]


def batch_of(kind: str, vocab: int, seed: int, lengths: list[int], start: int) -> Batch:
    """One row per length. `padded_left` and `padded_right` are ragged; `packed` puts all in one row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(vocab, (length + 1,), generator=generator) for length in lengths]
    places = [torch.arange(length) + start for length in lengths]
    if kind == "packed":
        return packed(rows, places)
    width = max(lengths)
    shape = (len(rows), width)
    tokens, targets, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    keep = torch.zeros(shape, dtype=torch.bool)
    for b, (row, place) in enumerate(zip(rows, places, strict=True)):
        where = slice(width - len(place), None) if kind == "padded_left" else slice(0, len(place))
        tokens[b, where], targets[b, where], positions[b, where], keep[b, where] = row[:-1], row[1:], place, True
    ours, theirs = {"positions_BL": positions}, {"position_ids": positions}
    if kind != "whole":
        ours, theirs = ours | {"keep_BL": keep}, theirs | {"attention_mask": keep.long()}
    return Batch(tokens, targets, keep, ours, theirs)


def packed(rows: list[Tensor], places: list[Tensor]) -> Batch:
    """Documents one after the other; the reference gets the block-diagonal causal mask written out."""
    documents = torch.cat([torch.full((len(place),), number) for number, place in enumerate(places)])
    visible = (documents[:, None] == documents[None, :]).tril()
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e30)
    positions = torch.cat(places)[None]
    tokens, targets = torch.cat([row[:-1] for row in rows])[None], torch.cat([row[1:] for row in rows])[None]
    ours = {"positions_BL": positions, "documents_BL": documents[None]}
    theirs = {"position_ids": positions, "attention_mask": mask[None, None]}
    return Batch(tokens, targets, torch.ones_like(tokens, dtype=torch.bool), ours, theirs)


def reference_result(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    """Logits and loss of the counted tokens and all gradients, computed by transformers in float64."""
    patch = pytest.MonkeyPatch()
    with float64_reference(patch):
        reference = build_reference(model)
        logits = reference(batch.tokens, **batch.theirs).logits[batch.counted]
        loss = torch.nn.functional.cross_entropy(logits, batch.targets[batch.counted])
        loss.backward()
    gradients = reference_tensors(reference, gradients=True)
    names = [t.name for t in logical_tensors(model.config) if t.group != "none"]
    return {"logits": logits.detach(), "loss": loss.detach()} | {name: gradients[name] for name in names}


def our_result(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    """The same of our model, in its own precision."""
    hidden, _ = model(batch.tokens, **batch.ours)
    loss = model.loss(hidden, batch.targets, batch.counted.to(hidden.dtype))
    loss.backward()
    result = {"logits": model.logits(hidden)[batch.counted].detach(), "loss": loss.detach()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for tensor in logical_tensors(model.config):
        if tensor.group != "none":
            gradient = gradients[tensor.parameter]
            assert gradient is not None, tensor.name
            result[tensor.name] = part(gradient, tensor)
    return result


def check(config: ModelConfig, batch: Batch, seed: int) -> None:
    model = build(config, seed)
    expected = reference_result(model, batch)
    compare(our_result(model, batch), expected, 1e-9)
    single = build(config, seed).float()
    single.compute_dtype = torch.float32
    compare(our_result(single, batch), expected, 1e-4)


def compare(ours: dict[str, Tensor], expected: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        wanted = torch.zeros_like(ours[name]) if value is None else value
        torch.testing.assert_close(
            ours[name].double(),
            wanted.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@EXAMPLES
@given(
    configs(),
    st.sampled_from(["whole", "padded_left", "padded_right", "packed"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([0, 0, 5, 4093, 131000]),
    st.integers(0, 2**16),
)
def test_every_drawn_model_equals_the_reference(
    config: ModelConfig, kind: str, lengths: list[int], start: int, seed: int
) -> None:
    lengths = lengths[:1] * len(lengths) if kind == "whole" else lengths
    check(config, batch_of(kind, config.vocab_size, seed, lengths, start), seed)


@pytest.mark.parametrize("kind", ["padded_left", "padded_right", "packed"])
@pytest.mark.parametrize("shape", ["groups", "yarn"])
def test_ragged_batches_of_the_named_shapes(shape: str, kind: str) -> None:
    config = SHAPES[shape]
    check(config, batch_of(kind, config.vocab_size, 3, [11, 4, 7], 0), seed=3)


def test_groups_stay_closed_when_every_score_in_the_open_ones_is_negative() -> None:
    """A mask of zero instead of -inf would pick closed experts over open ones with a negative selection score."""
    model = build(SHAPES["groups"], seed=1)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.sub_(4.0)
    batch = batch_of("whole", model.config.vocab_size, 1, [13, 13], 0)
    compare(our_result(model, batch), reference_result(model, batch), 1e-9)
