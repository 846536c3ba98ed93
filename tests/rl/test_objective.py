from dataclasses import replace

import pytest
import torch
from torch import Tensor

from k2.config.model import ModelConfig
from k2.errors import StageError
from k2.model.transformer import Transformer
from k2.rl.objective import MAX_LOG_RATIO, PtxBatch, RolloutBatch, policy_loss, response_logprobs, squared_gap
from k2.training.batches import NextTokenLoss, TokenBatch

SHAPE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)


def small_model() -> Transformer:
    return Transformer(SHAPE).initialize(3)


def small_batch(old: Tensor | None = None) -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, 32, (4, 9), generator=generator)
    response_BL = torch.zeros(4, 9, dtype=torch.bool)
    keep_BL = torch.zeros(4, 9, dtype=torch.bool)
    for row, (start, end) in enumerate([(3, 5), (3, 9), (4, 7), (2, 6)]):
        response_BL[row, start:end], keep_BL[row, :end] = True, True
    return RolloutBatch(
        tokens_BL=tokens_BL,
        response_BL=response_BL,
        keep_BL=keep_BL,
        rollout_logprobs_BL=torch.zeros(4, 9),
        advantages_B=torch.tensor([0.5, -0.5, 0.25, -0.25]),
        temperature=0.7,
        measures={"reward": torch.tensor([1.0, 0.0, 1.0, 0.5])},
        old_logprobs_B=old,
    )


def naive_logprobs(model: Transformer, batch: RolloutBatch) -> list[Tensor]:
    """One sample at a time, without padding, from full softmaxes."""
    found = []
    for row in range(4):
        length, start = int(batch.keep_BL[row].sum()), int(batch.response_BL[row].int().argmax())
        tokens = batch.tokens_BL[row, :length]
        hidden, _ = model(tokens[None])
        table = (model.logits(hidden)[0] / batch.temperature).log_softmax(-1)
        found.append(torch.stack([table[i - 1, tokens[i]] for i in range(start, length)]))
    return found


def test_response_log_probabilities_equal_a_plain_loop() -> None:
    model, batch = small_model(), small_batch()
    logprobs_BL, _ = response_logprobs(model, batch)
    for row, expected in enumerate(naive_logprobs(model, batch)):
        torch.testing.assert_close(logprobs_BL[row][batch.response_BL[row]], expected, atol=1e-5, rtol=1e-5)
    assert logprobs_BL[~batch.response_BL].abs().sum() == 0


def test_the_loss_is_the_papers_formula() -> None:
    model, tau = small_model(), 0.3
    old_B = torch.tensor([-5.0, -20.0, -9.0, -12.0])
    loss = policy_loss(tau, 0.0)(model, small_batch(old_B))
    terms = [
        (advantage - tau * (new.sum() - old)) ** 2
        for advantage, new, old in zip(
            [0.5, -0.5, 0.25, -0.25], naive_logprobs(model, small_batch()), old_B, strict=True
        )
    ]
    torch.testing.assert_close(loss.total, torch.stack(terms).sum() / (2 * tau), rtol=1e-4, atol=1e-4)
    assert loss.weight == 4
    assert loss.metrics["reward"] == 2.5


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_on_policy_its_gradient_is_the_policy_gradient_with_a_mean_baseline(tau: float) -> None:
    model = small_model()
    policy_loss(tau, 0.0)(model, small_batch()).total.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = zip([0.5, -0.5, 0.25, -0.25], naive_logprobs(model, small_batch()), strict=True)
    (-torch.stack([advantage * new.sum() for advantage, new in expected]).sum()).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)


def test_following_the_gradient_raises_what_was_rewarded() -> None:
    model, batch = small_model(), small_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    before = response_logprobs(model, batch)[0].sum(1).detach()
    for _ in range(5):
        optimizer.zero_grad()
        policy_loss(0.1, 0.0)(model, batch.with_old(before)).total.backward()
        optimizer.step()
    change = response_logprobs(model, batch)[0].sum(1).detach() - before
    assert (batch.advantages_B * change).sum() > 0.1


def test_log_ratios_are_clamped_and_then_have_no_gradient() -> None:
    ratios_B = torch.tensor([0.0, 25.0, -25.0, 5.0], requires_grad=True)
    losses_B = squared_gap(torch.zeros(4), ratios_B, 0.1)
    losses_B.sum().backward()
    assert losses_B[1].item() == losses_B[2].item() == pytest.approx(0.1 * MAX_LOG_RATIO**2 / 2)
    assert ratios_B.grad.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5])


def poisoned(model: Transformer, batch: RolloutBatch) -> RolloutBatch:
    """Sample 1 alone contains a token whose embedding is not a number."""
    with torch.no_grad():
        model.embed_tokens.weight[31] = torch.nan
    tokens_BL = batch.tokens_BL.clamp(max=30)
    tokens_BL[1, 0] = 31
    return replace(batch, tokens_BL=tokens_BL)


def test_a_nan_fails_its_sample_and_not_the_run() -> None:
    model = small_model()
    batch = poisoned(model, small_batch())
    loss = policy_loss(0.1, 0.0)(model, batch)
    clean = policy_loss(0.1, 0.0)(model, batch.select(torch.tensor([True, False, True, True])))
    assert loss.metrics["failed"] == 1
    assert loss.weight == 3
    torch.testing.assert_close(loss.total, clean.total)
    loss.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_nothing_left_to_train_on_is_a_stage_error() -> None:
    model = small_model()
    batch = poisoned(model, small_batch()).select(torch.tensor([False, True, False, False]))
    with pytest.raises(StageError, match="not finite"):
        policy_loss(0.1, 0.0)(model, batch)


def test_the_gap_between_trainer_and_rollout_is_measured_per_token() -> None:
    model, batch = small_model(), small_batch()
    logprobs_BL = response_logprobs(model, batch)[0].detach()
    exact = replace(batch, rollout_logprobs_BL=logprobs_BL)
    shifted = replace(batch, rollout_logprobs_BL=logprobs_BL + 0.25 * batch.response_BL)
    loss_fn = policy_loss(0.1, 0.0)
    assert loss_fn(model, exact).metrics["logprob_gap"] < 1e-6
    metrics = loss_fn(model, shifted).metrics
    assert metrics["logprob_gap"] / 4 == pytest.approx(0.25, rel=1e-5)
    assert metrics["logprob_gap_max"] / 4 == pytest.approx(0.25, rel=1e-5)


def test_ptx_adds_its_coefficient_times_the_mean_loss_to_the_steps_mean() -> None:
    model = small_model()
    demonstrations = TokenBatch(torch.arange(12).view(2, 6), torch.arange(1, 13).view(2, 6))
    loss = policy_loss(0.1, 0.5)(model, PtxBatch(demonstrations, samples=8))
    reference = NextTokenLoss()(model, demonstrations)
    assert loss.weight == 0
    torch.testing.assert_close(loss.total / 8, 0.5 * reference.total / reference.weight)
    assert loss.metrics["ptx_loss"] / 8 == pytest.approx((reference.total / reference.weight).item())
