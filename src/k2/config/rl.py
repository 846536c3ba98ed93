"""Reinforcement learning."""

from typing import Literal

from k2.config.base import Section, TrainingSection, setting
from k2.config.optimizer import OptimizerConfig


class RewardConfig(Section):
    """How the parts of a reward are weighted (report 3.2.1 to 3.2.3)."""

    verifier: float = setting(1.0, "weight of the task's own verifier", ge=0)
    rubric: float = setting(0.2, "weight of the win rate among the group's answers, judged pairwise", ge=0)
    budget_penalty: float = setting(0.5, "subtracted when an answer was cut off by its token budget", ge=0)


class RlConfig(TrainingSection):
    """Policy optimisation with K2's objective. The report keeps K, tau and the coefficients to itself."""

    tasks: dict[str, float] = setting(
        {
            "addition_3": 1.0,
            "multiplication_2": 1.0,
            "reasoning_gym/chain_sum": 1.0,
            "reasoning_gym/gcd": 1.0,
            "reasoning_gym/letter_counting": 1.0,
            "reasoning_gym/spell_backward": 1.0,
            "tool_call": 2.0,
        },
        "verifiable tasks to sample prompts from, with their weights",
        min_length=1,
    )
    general_share: float = setting(
        0.1,
        "share of prompts without a verifier (opening requests of trajectories), rewarded by rubric alone",
        ge=0,
        le=1,
    )
    iterations: int = setting(1000, "rounds of rollouts", ge=1)
    prompts: int = setting(256, "prompts per iteration", ge=1)
    samples: int = setting(16, "answers sampled per prompt (K)", ge=2)
    updates: int = setting(1, "optimizer steps per iteration, each on an equal part of the prompts", ge=1)
    max_tokens: int = setting(8192, "token budget of an answer", ge=1)
    segment_tokens: int | None = setting(
        None,
        "tokens an answer grows per iteration; longer ones go on in the next (partial rollout); null: no limit",
        ge=1,
    )
    max_prompt_tokens: int = setting(8192, "longer general prompts are left out", ge=8)
    temperature: float = setting(1.0, "sampling temperature of the first iteration", gt=0)
    final_temperature: float = setting(0.8, "sampling temperature of the last iteration (linear decay)", gt=0)
    tau: float = setting(0.1, "weight of the log-ratio in the objective", gt=0)
    old_policy: Literal["rollout", "trainer"] = setting(
        "trainer", "where log pi_old comes from: the rollout engine's report, or the trainer's own forward pass"
    )
    ptx_coefficient: float = setting(0.05, "weight of the language-model loss on demonstrations (PTX)", ge=0)
    ptx_demonstrations: int = setting(100_000, "size of the fixed set of demonstrated solutions for PTX", ge=1)
    ptx_context_length: int = setting(32768, "tokens of a packed row of demonstrations; longer ones are dropped", ge=16)
    ptx_batch_size: int = setting(4, "rows of demonstrations per update", ge=1)
    reward: RewardConfig = setting(RewardConfig(), "weights of the parts of the reward")
    micro_batch_tokens: int = setting(65536, "tokens, padding included, that pass through the model at once", ge=1)
    lr: float = setting(1e-6, "peak learning rate", gt=0)
    final_lr_ratio: float = setting(0.1, "learning rate at the end, as a share of the peak", ge=0, le=1)
    warmup_steps: int = setting(10, "steps of linear warm-up", ge=0)
    reset_optimizer: bool = setting(False, "forget the optimizer's state at every iteration, as k1.5 did")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "MuonClip")
    evaluation_items: int = setting(1000, "held-out items that accuracy is measured on", ge=1)
    evaluation_interval: int = setting(50, "iterations between points of the accuracy curve", ge=1)
    evaluation_curve_items: int = setting(256, "held-out items of a point of the accuracy curve", ge=1)
    checkpoint_iterations: int = setting(10, "iterations between checkpoints", semantic=False, ge=1)
