"""QK-Clip changes exactly the logits of the heads above tau, and nothing else."""

import pytest
import torch
from torch import Tensor

from k2.config.model import ModelConfig
from k2.model.layout import HeadRows, LogicalTensor, logical_tensors
from k2.model.mla import attention_context
from k2.model.rope import rotate
from k2.model.transformer import Transformer
from k2.optim.qk_clip import QKClip, clip_factors, plain_rows, row_factors, spectral_norms
from tests.optim.tiny import TINY

VARIANTS = [TINY, TINY.model_copy(update={"q_lora_rank": None})]


def logits_and_values(model: Transformer, layer: str, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """All logits [B, H, L, L] before the mask, and the values, of one layer's attention."""
    attention = model.layers[layer].self_attn
    config = model.config
    context = attention_context(config, x_BLD[..., 0], x_BLD.dtype)
    content, rotary = attention.queries(attention.query_latents(x_BLD)).tensor_split([config.qk_nope_head_dim], dim=-1)
    rotary = rotate(rotary, context.turn_BLR[:, :, None])
    latent, key = attention.latents(x_BLD, context.turn_BLR)
    kv = attention.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
    keys, values = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
    logits = torch.einsum("bihx,bjhx->bhij", content, keys) + torch.einsum("bihr,bjr->bhij", rotary, key)
    return logits, values


def make(config: ModelConfig) -> tuple[Transformer, dict[str, Tensor]]:
    model = Transformer(config, compute_dtype=torch.float64).double().initialize(0)
    return model, dict(model.named_parameters())


@pytest.mark.parametrize("config", VARIANTS)
@torch.no_grad()
def test_every_logit_of_a_clipped_head_scales_by_gamma(config: ModelConfig) -> None:
    model, weights = make(config)
    x = torch.randn(2, 6, config.hidden_size, dtype=torch.float64)
    before = {layer: logits_and_values(model, layer, x) for layer in model.layers}
    clip = QKClip(logical_tensors(config), tau=10.0)
    clip.observe(torch.tensor([[5.0, 40.0], [-3.0, 12.5]]))
    report = clip.apply(weights)
    torch.testing.assert_close(report.gammas, torch.tensor([[1.0, 0.25], [1.0, 0.8]]))
    for layer, (logits, values) in before.items():
        new_logits, new_values = logits_and_values(model, layer, x)
        factors = report.gammas[int(layer)].double()[None, :, None, None]
        torch.testing.assert_close(new_logits, logits * factors, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(new_values, values, rtol=0, atol=0)
    assert report.clipped == 2


@torch.no_grad()
def test_heads_below_tau_and_other_weights_keep_their_bits() -> None:
    _, weights = make(TINY)
    before = {name: weight.clone() for name, weight in weights.items()}
    clip = QKClip(logical_tensors(TINY), tau=10.0)
    clip.observe(torch.tensor([[5.0, 40.0], [10.0, 9.0]]))
    clip.apply(weights)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed == {"layers.0.self_attn.q_b_proj.weight", "layers.0.self_attn.kv_b_proj.weight"}
    for name in changed:
        half = len(weights[name]) // 2
        assert torch.equal(weights[name][:half], before[name][:half])


def test_the_models_own_maximum_is_tau_after_clipping() -> None:
    model, weights = make(TINY)
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(30.0)
    tokens = torch.randint(0, TINY.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    first = model(tokens)[1].max_logits_NH[0]
    tau = first.min().item() / 2  # every head of the first layer is above it, and its input does not change
    clip = QKClip(logical_tensors(TINY), tau)
    clip.observe(model(tokens)[1].max_logits_NH)
    clip.apply(weights)
    torch.testing.assert_close(model(tokens)[1].max_logits_NH[0], torch.full_like(first, tau), rtol=1e-5, atol=0)


def test_odd_maxima_change_nothing() -> None:
    maxima = torch.tensor([-5.0, -torch.inf, torch.nan, 0.0, 10.0])
    assert clip_factors(maxima, 10.0).tolist() == [1.0] * 5
    assert clip_factors(torch.tensor([1e9]), None).tolist() == [1.0]


def test_maxima_run_over_micro_batches_and_are_forgotten() -> None:
    clip = QKClip(logical_tensors(TINY), tau=10.0)
    for maxima in ([[1.0, 20.0], [0.0, 0.0]], [[30.0, 2.0], [0.0, -1.0]], [[30.0, 2.0], [0.0, -1.0]]):
        clip.observe(torch.tensor(maxima, dtype=torch.bfloat16))
    _, weights = make(TINY)
    assert clip.apply(weights).maxima.tolist() == [[30.0, 20.0], [0.0, 0.0]]
    assert clip.counts.tolist() == [[1, 1], [0, 0]]
    assert clip.apply(weights).clipped == 0


def test_row_factors_follow_the_component_rules() -> None:
    gamma = torch.tensor([0.25, 1.0])
    assert row_factors(HeadRows(2, 4, 2, 1), gamma).tolist() == [0.5, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_plain_attention_scales_each_head_by_its_gamma_and_no_other(key_heads: int) -> None:
    heads, dim, width = 4, 6, 10
    generator = torch.Generator().manual_seed(0)
    weights = {
        "q": torch.randn(heads * dim, width, generator=generator, dtype=torch.float64),
        "k": torch.randn(key_heads * dim, width, generator=generator, dtype=torch.float64),
    }
    x_LD = torch.randn(5, width, generator=generator, dtype=torch.float64)

    def logits() -> Tensor:
        q, k = ((x_LD @ weights[name].T).unflatten(-1, (-1, dim)) for name in ("q", "k"))
        return torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(heads // key_heads, dim=1))

    layout = [
        LogicalTensor(name, name, None, None, tuple(weights[name].shape), "muon", 7, name, rows)
        for name, rows in zip(("q", "k"), plain_rows(heads, key_heads, dim), strict=True)
    ]
    before = logits()
    clip = QKClip(layout, tau=10.0)
    clip.observe(torch.tensor([[5.0, 40.0, -3.0, 12.5]]))
    clip.apply(weights)
    gammas = torch.tensor([1.0, 0.25, 1.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(logits(), before * gammas[:, None, None], rtol=1e-6, atol=1e-9)


def test_layers_without_attention_do_not_shift_the_others() -> None:
    layout = [t for t in logical_tensors(TINY) if not (t.layer == 0 and t.head_rows)]
    _, weights = make(TINY)
    before = {name: weight.clone() for name, weight in weights.items()}
    clip = QKClip(layout, tau=10.0)
    clip.observe(torch.tensor([[20.0, 5.0]]))
    clip.apply(weights)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed == {"layers.1.self_attn.q_b_proj.weight", "layers.1.self_attn.kv_b_proj.weight"}


def test_peaks_and_smallest_gammas_are_kept_and_nan_is_not_one() -> None:
    clip = QKClip(logical_tensors(TINY), tau=10.0)
    _, weights = make(TINY)
    for maxima in ([[1.0, 20.0], [-4.0, torch.nan]], [[3.0, 12.5], [-5.0, 7.0]]):
        clip.observe(torch.tensor(maxima))
        clip.apply(weights)
    assert clip.peaks.tolist() == [[3.0, 20.0], [-4.0, 7.0]]
    assert clip.gammas.tolist() == [[1.0, 0.5], [1.0, 1.0]]
    assert clip.counts.tolist() == [[0, 2], [0, 0]]


def test_spectral_norms_are_those_of_the_rows_that_make_logits() -> None:
    _, weights = make(TINY)
    norms = spectral_norms(logical_tensors(TINY), weights)
    query, keys = weights["layers.1.self_attn.q_b_proj.weight"], weights["layers.1.self_attn.kv_b_proj.weight"]
    assert norms["q_b_proj"][1][1] == pytest.approx(torch.linalg.svdvals(query[6:])[0].item(), rel=1e-5)
    assert norms["kv_b_proj"][1][0] == pytest.approx(torch.linalg.svdvals(keys[:4])[0].item(), rel=1e-5)
