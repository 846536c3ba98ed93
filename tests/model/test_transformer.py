"""Our model against transformers' DeepseekV3ForCausalLM and float64 loops."""

import math

import pytest
import torch
from torch import Tensor

from k2.config.model import ModelConfig
from k2.model.hf import part
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from tests.model.reference import SHAPES, TINY, build, build_reference, float64_reference, reference_tensors


def tokens_for(config: ModelConfig, batch: int = 2, length: int = 19, seed: int = 5) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def next_token_loss(model: Transformer, tokens: Tensor) -> Tensor:
    hidden, _ = model(tokens)
    return model.loss(hidden[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logits_loss_and_every_gradient_equal_the_reference(
    shape: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(SHAPES[shape])
    if dtype is torch.float32:
        model.float().compute_dtype = torch.float32
        check_against_reference(model, tolerance)
        return
    with float64_reference(monkeypatch):
        check_against_reference(model, tolerance)


def check_against_reference(model: Transformer, tolerance: float) -> None:
    reference = build_reference(model)
    tokens = tokens_for(model.config)
    expected = reference(tokens, labels=tokens)
    expected.loss.backward()
    hidden, _ = model(tokens)
    loss = model.loss(hidden[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.testing.assert_close(model.logits(hidden), expected.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance, atol=tolerance)
    wanted = reference_tensors(reference, gradients=True)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for tensor in logical_tensors(model.config):
        if tensor.group != "none":
            gradient = gradients[tensor.parameter]
            assert gradient is not None
            torch.testing.assert_close(part(gradient, tensor), wanted[tensor.name], rtol=tolerance, atol=tolerance)


def test_experts_without_tokens_get_zero_gradients() -> None:
    from k2.model.moe import Experts

    experts = Experts(5, 4, 3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[3, 1], [1, 3], [3, 1]])
    experts(torch.ones(3, 4), chosen, torch.ones(3, 2)).sum().backward()
    used = experts.down_proj.grad.abs().sum((1, 2)) > 0  # type: ignore[union-attr]
    assert used.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("shape", ["plain", "yarn", "full_query"])
def test_largest_logit_equals_a_loop(shape: str) -> None:
    config = SHAPES[shape]
    model = build(config)
    tokens = tokens_for(config, length=11)
    _, statistics = model(tokens)
    attention = model.layers["0"].self_attn
    x = model.layers["0"].input_layernorm(model.embed_tokens.weight[tokens])
    assert torch.allclose(statistics.max_logits_NH[0], loop_maximum(attention, x, config), rtol=1e-12)


def loop_maximum(attention: torch.nn.Module, x: Tensor, config: ModelConfig) -> Tensor:
    """Pair by pair, with the rotation written as complex numbers."""
    from k2.model.rope import inverse_frequencies, softmax_scale

    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    hidden = x if config.q_lora_rank is None else attention.q_a_layernorm(attention.q_a_proj(x))
    query = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
    q = query(hidden).unflatten(-1, (heads, nope + rope))
    latent, shared = attention.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, rope], -1)
    k = attention.kv_b_proj(attention.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))[..., :nope]
    frequencies = torch.tensor(inverse_frequencies(config), dtype=torch.float64)
    best = torch.full((heads,), -math.inf, dtype=torch.float64)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for j in range(i + 1):
                turn = torch.polar(torch.ones_like(frequencies), frequencies * (i - j))
                pairs_q = torch.view_as_complex(q[b, i, :, nope:].reshape(heads, -1, 2))
                pairs_k = torch.view_as_complex(shared[b, j].reshape(-1, 2))
                rotary = (pairs_q * turn * pairs_k.conj()).real.sum(-1)
                content = (q[b, i, :, :nope] * k[b, j]).sum(-1)
                best = torch.maximum(best, (content + rotary).detach() * softmax_scale(config))
    return best


def test_packed_documents_do_not_see_each_other() -> None:
    model = build(TINY)
    first, second = tokens_for(TINY, 1, 7, 1), tokens_for(TINY, 1, 5, 2)
    packed = torch.cat([first, second], dim=1)
    documents = torch.tensor([[0] * 7 + [1] * 5])
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    hidden, statistics = model(packed, documents_BL=documents, positions_BL=positions)
    one, s1 = model(first)
    two, s2 = model(second)
    torch.testing.assert_close(hidden, torch.cat([one, two], dim=1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(statistics.max_logits_NH, torch.maximum(s1.max_logits_NH, s2.max_logits_NH))
    assert torch.equal(statistics.expert_counts_ME, s1.expert_counts_ME + s2.expert_counts_ME)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left: bool) -> None:
    model = build(TINY)
    tokens = tokens_for(TINY, 1, 9)
    zeros, pad = torch.zeros(1, 4, dtype=torch.int64), slice(4, None) if left else slice(0, 9)
    padded = torch.cat([zeros, tokens] if left else [tokens, zeros], dim=1)
    keep = torch.zeros(1, 13, dtype=torch.bool)
    keep[:, pad] = True
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    hidden, statistics = model(padded, keep_BL=keep, positions_BL=positions)
    expected, alone = model(tokens)
    torch.testing.assert_close(hidden[:, pad], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(statistics.max_logits_NH, alone.max_logits_NH)


def test_a_pipeline_of_slices_equals_the_whole() -> None:
    whole = build(TINY)
    x = tokens_for(TINY)
    expected, statistics = whole(x)
    counts = []
    for layers in (range(1), range(1, 3)):
        stage = Transformer(TINY, compute_dtype=torch.float64, layers=layers).double()
        stage.load_state_dict({k: v for k, v in whole.state_dict().items() if k in stage.state_dict()})
        x, part_statistics = stage(x)
        counts.append(part_statistics.expert_counts_ME)
    assert torch.equal(x, expected)
    assert torch.equal(torch.cat(counts), statistics.expert_counts_ME)


def test_every_parameter_is_covered_once_by_the_layout() -> None:
    with torch.device("meta"):
        model = Transformer(SHAPES["two_shared"])
    sizes = dict.fromkeys(model.state_dict(), 0)
    for tensor in logical_tensors(model.config):
        value = part(model.state_dict()[tensor.parameter], tensor)
        assert tuple(value.shape) == tensor.shape
        sizes[tensor.parameter] += value.numel()
    assert sizes == {name: value.numel() for name, value in model.state_dict().items()}


def test_the_full_model_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig())
    assert sum(value.numel() for value in model.state_dict().values()) == 1_026_408_232_448


@pytest.mark.parametrize("kept", [0, 6 * TINY.vocab_size, 2**30])
def test_chunked_loss_equals_cross_entropy(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2.model.loss.CHUNK_VALUES", 2 * TINY.vocab_size)
    monkeypatch.setattr("k2.model.loss.PRODUCT_ROWS", 5)
    monkeypatch.setattr("k2.model.loss.KEPT_VALUES", kept)
    model = build(TINY)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 8, TINY.hidden_size, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, weights = tokens_for(TINY, 2, 8), torch.rand(2, 8, generator=generator, dtype=torch.float64)
    head = model.lm_head.weight  # type: ignore[union-attr]
    loss = model.loss(hidden, targets, weights)
    got = torch.autograd.grad(loss, [hidden, head])
    plain = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none")
    expected = (plain * weights.flatten()).sum() / weights.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, [hidden, head]))


def test_bfloat16_follows_float32_and_repeats_exactly() -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        model = Transformer(TINY, compute_dtype=dtype).initialize(0)
        loss = next_token_loss(model, tokens_for(TINY))
        loss.backward()
        losses.append(loss)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[1] == losses[2]
    assert abs(losses[0] - losses[1]) < 0.02


def test_balance_loss_is_one_when_every_expert_is_equally_likely_and_chosen() -> None:
    from k2.model.moe import Routing, balance_loss

    experts = torch.arange(12).remainder(6).view(6, 2)
    routing = Routing(experts, torch.ones(6, 2), torch.full((6, 6), 0.5))
    assert balance_loss(routing, 2) == 1.0
    crowded = Routing(torch.zeros_like(experts), torch.ones(6, 2), torch.eye(6)[0].expand(6, 6))
    assert balance_loss(crowded, 2) == 6.0
    silent = Routing(experts, torch.ones(6, 2), torch.zeros(6, 6))
    assert balance_loss(silent, 2) == 0.0


def test_bias_step_raises_underloaded_experts_and_keeps_the_mean() -> None:
    from k2.model.moe import bias_step

    step = bias_step(torch.tensor([[0, 4, 8, 4]]))
    assert step.tolist() == [[1.0, 0.0, -1.0, 0.0]]
    assert bias_step(torch.tensor([1, 1, 1, 9])).sum() == 0


def test_weight_transform_reaches_routed_experts_only() -> None:
    model = build(TINY)
    tokens = tokens_for(TINY)
    before = next_token_loss(model, tokens)
    seen = []
    model.set_weight_transform(lambda weight: (seen.append(tuple(weight.shape)), weight * 0.5)[1])
    assert next_token_loss(model, tokens) != before
    assert set(seen) == {(6, 64, 48), (6, 48, 32)}
