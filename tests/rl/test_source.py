import json
import math
from dataclasses import replace

import pytest
import torch

from k2.config.model import ModelConfig
from k2.config.rl import RewardConfig, RlConfig
from k2.data.tokenizer import Tokenizer
from k2.errors import StageError
from k2.evaluation.harness import encode_prompt
from k2.model.generate import Sample
from k2.model.transformer import Transformer
from k2.rl.critic import RuleCritic
from k2.rl.objective import PtxBatch, RolloutBatch, response_logprobs
from k2.rl.rollout import Group, Rollout
from k2.rl.trainer import Trainer, metrics_of, report_of
from tests.conftest import SilentProgress

SHAPE = ModelConfig(
    vocab_size=320,
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
    max_position_embeddings=256,
    initializer_range=0.3,
)
CONFIG = RlConfig(
    tasks={"addition_1": 1.0},
    general_share=0.0,
    iterations=3,
    prompts=4,
    samples=3,
    max_tokens=4,
    temperature=1.0,
    final_temperature=0.5,
    ptx_coefficient=0.1,
    ptx_demonstrations=8,
    ptx_context_length=64,
    ptx_batch_size=2,
    micro_batch_tokens=64,
    lr=1e-3,
    warmup_steps=0,
    evaluation_items=10,
    evaluation_interval=2,
    evaluation_curve_items=5,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["user assistant 0123456789"] * 3, 320, digits_per_token=1, special_slots=20)


def make(config: RlConfig, tokenizer: Tokenizer) -> Trainer:
    general = [[{"role": "user", "content": "01"}], [{"role": "user", "content": "9" * 300}]]
    return Trainer(config, Transformer(SHAPE).initialize(1), tokenizer, RuleCritic(), general)


def rollouts(trainer: Trainer) -> list[RolloutBatch]:
    return [batch for batch in trainer.source.next_step() if isinstance(batch, RolloutBatch)]


def test_what_is_trained_on_is_token_for_token_what_the_policy_wrote(tokenizer: Tokenizer) -> None:
    trainer = make(CONFIG, tokenizer)
    batches = rollouts(trainer)
    assert sum(len(batch.tokens_BL) for batch in batches) == 12
    assert len(batches) > 1
    assert all(batch.tokens_BL.numel() <= 64 for batch in batches)
    for batch in batches:
        logprobs_BL, _ = response_logprobs(trainer.state.model, batch)
        torch.testing.assert_close(logprobs_BL, batch.rollout_logprobs_BL, atol=1e-4, rtol=1e-4)
        assert (batch.response_BL.sum(1) <= 4).all()
        assert batch.old_logprobs_B is None


def test_advantages_are_centred_within_each_group_of_samples(tokenizer: Tokenizer) -> None:
    batches = rollouts(make(CONFIG, tokenizer))
    rewards = torch.cat([batch.measures["reward"] for batch in batches])
    advantages = torch.cat([batch.advantages_B for batch in batches])
    assert advantages.sum().item() == pytest.approx(0, abs=1e-5)
    assert rewards.std() > 0
    assert advantages.std() > 0


def test_where_pi_old_comes_from_is_one_choice(tokenizer: Tokenizer) -> None:
    rollout = rollouts(make(CONFIG.model_copy(update={"old_policy": "rollout"}), tokenizer))
    for batch in rollout:
        torch.testing.assert_close(batch.old_logprobs_B, batch.rollout_logprobs_BL.sum(1))
    trainer = make(CONFIG.model_copy(update={"updates": 2}), tokenizer)
    first, second = rollouts(trainer), rollouts(trainer)
    for batch in [*first, *second]:
        expected = response_logprobs(trainer.state.model, batch)[0].sum(1)
        torch.testing.assert_close(batch.old_logprobs_B, expected.detach())
    assert sum(len(batch.tokens_BL) for batch in first) == sum(len(batch.tokens_BL) for batch in second) == 6


def test_demonstrations_come_along_once_per_update(tokenizer: Tokenizer) -> None:
    step = make(CONFIG, tokenizer).source.next_step()
    (ptx,) = [batch for batch in step if isinstance(batch, PtxBatch)]
    assert ptx.samples == 12
    assert make(CONFIG.model_copy(update={"ptx_coefficient": 0.0}), tokenizer).source._ptx is None


def test_the_temperature_decays_over_the_iterations(tokenizer: Tokenizer) -> None:
    trainer = make(CONFIG, tokenizer)
    assert [rollouts(trainer)[0].temperature for _ in range(3)] == [1.0, 0.75, 0.5]


def test_equal_prompts_in_one_iteration_get_different_answers(tokenizer: Tokenizer) -> None:
    trainer = make(CONFIG.model_copy(update={"prompts": 40}), tokenizer)
    trainer.source.next_step()
    names = [trainer.source._prompts.example(trainer.source._prompts.name(i)).messages[0]["content"] for i in range(40)]
    twice = next(name for name in names if names.count(name) > 1)
    prompt_trainer = make(CONFIG.model_copy(update={"prompts": 40}), tokenizer)
    groups = prompt_trainer.source._roll_out()
    same = [group for group, name in zip(groups, names, strict=True) if name == twice]
    answers = [[rollout.response_ids for rollout in group.rollouts] for group in same]
    assert answers[0] != answers[1]


def test_a_sample_with_a_nan_log_probability_fails_alone_and_is_counted(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = Rollout.extend
    count = iter(range(1000))

    def poison(self: Rollout, sample: Sample, version: int) -> None:
        bad = next(count) == 4
        extend(self, replace(sample, logprobs=[math.nan] * len(sample.logprobs)) if bad else sample, version)

    monkeypatch.setattr(Rollout, "extend", poison)
    trainer = make(CONFIG, tokenizer)
    assert sum(len(batch.tokens_BL) for batch in rollouts(trainer)) == 11
    assert trainer.source.failed == 1
    assert trainer.source.state_dict()["failed"] == 1


def test_a_long_answer_grows_over_iterations_and_every_token_knows_its_policy(tokenizer: Tokenizer) -> None:
    config = CONFIG.model_copy(update={"segment_tokens": 2, "max_tokens": 6, "iterations": 6})
    trainer = make(config, tokenizer)
    name = trainer.source._prompts.name(0)
    prompt_ids = encode_prompt(tokenizer, trainer.source._prompts.example(name))
    nearly = [Rollout([5] * 5, [-1.0] * 5, [0] * 5) for _ in range(3)]
    trainer.source._growing, trainer.source._drawn = [Group(name, prompt_ids, nearly)], 1
    trainer.run(None, SilentProgress())
    ages = trainer.state.history.curve("policy_age")
    assert ages[0] == 0
    assert max(ages) > 0
    grown = [r for group in trainer.source._growing for r in group.rollouts]
    assert all(len(r.versions) == len(r.logprobs) == len(r.response_ids) <= 6 for r in grown)
    assert trainer.source._drawn > 4


def test_a_budget_cuts_answers_off_and_they_pay(tokenizer: Tokenizer) -> None:
    reward = RewardConfig(verifier=0.0, rubric=0.0, budget_penalty=0.5)
    batches = rollouts(make(CONFIG.model_copy(update={"reward": reward}), tokenizer))
    for batch in batches:
        assert batch.measures["reward"].tolist() == (-0.5 * batch.measures["truncated"]).tolist()
    assert any(batch.measures["truncated"].sum() > 0 for batch in batches)


def test_general_prompts_take_part_and_long_ones_are_left_out(tokenizer: Tokenizer) -> None:
    config = CONFIG.model_copy(update={"general_share": 1.0, "max_prompt_tokens": 32})
    trainer = make(config, tokenizer)
    batches = rollouts(trainer)
    assert all((batch.measures["verifier"] == 0).all() for batch in batches)
    assert max(batch.tokens_BL.shape[1] for batch in batches) <= 36


def test_a_restored_source_continues_with_its_growing_answers(tokenizer: Tokenizer) -> None:
    config = CONFIG.model_copy(update={"segment_tokens": 2, "max_tokens": 6})
    one, two = make(config, tokenizer), make(config, tokenizer)
    one.source.next_step()
    two.source.load_state_dict(json.loads(json.dumps(one.source.state_dict())))
    for first, second in zip(rollouts(one), rollouts(two), strict=True):
        assert torch.equal(first.tokens_BL, second.tokens_BL)
        assert torch.equal(first.rollout_logprobs_BL, second.rollout_logprobs_BL)
        assert torch.equal(first.advantages_B, second.advantages_B)


def test_an_iteration_under_way_cannot_be_saved(tokenizer: Tokenizer) -> None:
    trainer = make(CONFIG.model_copy(update={"updates": 2}), tokenizer)
    trainer.source.next_step()
    with pytest.raises(StageError, match="between iterations"):
        trainer.source.state_dict()


def test_resetting_forgets_momenta_and_nothing_else(tokenizer: Tokenizer) -> None:
    trainer = make(CONFIG.model_copy(update={"reset_optimizer": True}), tokenizer)
    for tensor in trainer.state.optimizer.state_dict().values():
        tensor.fill_(3)
    weights = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
    trainer.source.next_step()
    state = trainer.state.optimizer.state_dict()
    forgotten = [name for name in state if name.startswith(("momentum.", "exp_avg", "steps"))]
    assert all((state[name] == 0).all() for name in forgotten)
    assert (state["qk_clip.counts"] == 3).all()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.state.model.state_dict().items())


def test_a_run_reports_rewards_accuracy_and_the_gap(tokenizer: Tokenizer) -> None:
    trainer = make(CONFIG, tokenizer)
    state = trainer.run(None, SilentProgress())
    metrics = metrics_of(state)
    assert state.step == 3
    assert [note["step"] for note in state.notes["accuracy"]] == [0, 2, 3]
    assert metrics["after"]["greedy"]["n"] == 10
    assert metrics["logprob_gap"] < 1e-4
    assert {"reward_first", "reward_last", "accuracy_before", "accuracy_after"} <= metrics.keys()
    report = json.loads(json.dumps(report_of(state)))
    assert len(report["curves"]["reward"]) == 3
    assert {"prompt", "before", "after", "passed"} == report["examples"][0].keys()


def test_the_engine_follows_the_live_weights(tokenizer: Tokenizer) -> None:
    trainer = make(CONFIG, tokenizer)
    before = trainer.source._roll_out()
    with torch.no_grad():
        trainer.state.model.lm_head.weight.mul_(-1)
    after = rollouts(trainer)
    assert len(before) == 4
    for batch in after:
        logprobs_BL, _ = response_logprobs(trainer.state.model, batch)
        torch.testing.assert_close(logprobs_BL, batch.rollout_logprobs_BL, atol=1e-4, rtol=1e-4)
