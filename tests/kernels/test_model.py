"""The whole model through the kernels, in the interpreter, against its torch path: one switch between them."""

import logging
from types import SimpleNamespace

import pytest
import torch

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.model import backend
from k2.model.backend import use_kernels
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.quant.fake_quant import fake_quantize

CONFIG = ModelConfig(
    vocab_size=97, hidden_size=48, intermediate_size=80, moe_intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=20, qk_rope_head_dim=8, v_head_dim=12,
    n_routed_experts=5, num_experts_per_tok=2,
)  # fmt: skip
EMPTY = 3
"""An expert that no token chooses."""


def draw_model(**options):
    model = Transformer(CONFIG, **options).initialize(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4).add_(0.1 * torch.randn_like(parameter) if "norm" in name else 0)
    mixture = model.layers["1"].mlp
    mixture.gate.e_score_correction_bias[EMPTY] = -10
    return model


def step(model, choice, tokens, **masks):
    """Loss, log-probabilities, statistics and every gradient of one forward and backward pass."""
    use_kernels(choice)
    model.zero_grad()
    hidden, statistics = model(tokens[:, :-1], with_balance_loss="keep_BL" not in masks, **masks)
    log_probs = model.log_probs(hidden, tokens[:, 1:])
    weights = masks.get("keep_BL", torch.ones_like(log_probs)).float() * torch.linspace(0.5, 2, log_probs.shape[1])
    loss = statistics.balance_loss - (log_probs * weights).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, (log_probs * weights).detach(), statistics, gradients


def masks(name):
    """By case: documents that end inside of a row, or padding on both sides."""
    if name == "documents":
        return {"documents_BL": torch.tensor([[0] * 4 + [1] + [2] * 6, [0] * 10 + [1]])}
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[0, :3], keep[1, 8:] = False, False
    return {"keep_BL": keep, "positions_BL": (keep.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of pairs that are masked afterwards
@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        ("documents", ("norms", "mla_up_projections", "mlp_up_projections")),
        ("padding", ("layers",)),
    ],
)
def test_forward_and_backward(case, recompute):
    model, tokens, given = draw_model(recompute=recompute), torch.randint(97, (2, 12)), masks(case)
    loss, log_probs, statistics, gradients = step(model, "torch", tokens, **given)
    with_kernels = step(model, "triton", tokens, **given)
    torch.testing.assert_close(with_kernels[0], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(with_kernels[1], log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_kernels[2].max_logits_NH, statistics.max_logits_NH, rtol=1e-5, atol=1e-6)
    if case != "padding":  # what padding chooses is nobody's business
        assert torch.equal(with_kernels[2].expert_counts_ME, statistics.expert_counts_ME)
        assert statistics.expert_counts_ME[0, EMPTY] == 0
        assert not with_kernels[3]["layers.1.mlp.experts.down_proj"][EMPTY].any()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(with_kernels[3][name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=name)


def test_a_training_step_of_muonclip():
    """Newton-Schulz of symmetric products; a head whose logits are too large is clipped by the kernel's maximum."""
    tokens, weights, losses = torch.randint(97, (2, 12)), {}, []
    config = OptimizerConfig(newton_schulz_bf16=False, tau=0.5)
    for choice in ("torch", "triton"):
        torch.manual_seed(1)
        model = draw_model()
        optimizer = MuonClip(model.named_parameters(), logical_tensors(CONFIG), config, lr=0.02)
        loss, _, statistics, _ = step(model, choice, tokens)
        losses.append(loss)
        optimizer.qk_clip.observe(statistics.max_logits_NH)
        optimizer.step()
        assert optimizer.clip_report.gammas.min() < 1
        weights[choice] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for name, weight in weights["torch"].items():
        torch.testing.assert_close(weights["triton"][name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_int4_aware_training_sees_what_an_export_stores():
    weight = torch.randn(3, 8, 64)
    results = []
    for choice in ("torch", "triton"):
        use_kernels(choice)
        leaf = weight.clone().requires_grad_()
        result = fake_quantize(32)(leaf)
        (gradient,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
        results.append((result.detach(), gradient))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_without_a_gpu_torch_runs_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET")
    backend._warn.cache_clear()
    x = torch.ones(2)
    with caplog.at_level(logging.WARNING):
        assert backend.kernels_for(x) is None
        assert not caplog.records
        use_kernels("triton")
        assert [backend.kernels_for(x), backend.kernels_for(x)] == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: triton needs a CUDA GPU, tensors are elsewhere: torch runs instead"
    ]


@pytest.mark.parametrize(
    ("choice", "dtype", "elementwise", "taken"),
    [
        ("auto", torch.bfloat16, False, True),
        ("auto", torch.float32, False, False),
        ("auto", torch.float32, True, True),
        ("triton", torch.float32, False, True),
        ("triton", torch.float64, True, False),
        ("torch", torch.bfloat16, True, False),
    ],
)
def test_what_the_kernels_take_on_a_gpu(choice, dtype, elementwise, taken):
    use_kernels(choice)
    kernels = backend.kernels_for(SimpleNamespace(is_cuda=True, dtype=dtype), elementwise=elementwise)
    assert (kernels is not None) == taken
