"""INT4 quantisation-aware training of the routed experts, as Kimi K2 Thinking's model card describes it."""

from typing import Literal, Self

from pydantic import model_validator

from k2.config.base import TrainingSection, setting
from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig


class QuantizeConfig(TrainingSection):
    """How the routed experts learn to live with four bits. Length and rate of K2's own QAT are not published."""

    group_size: int = setting(
        32, "weights that share one scale; divides hidden_size and moe_intermediate_size", ge=8, multiple_of=8
    )
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
        "verifiable tasks whose solutions are trained on, with their weights",
        min_length=1,
    )
    demonstrations: int = setting(100_000, "size of the fixed set of solved problems", ge=1)
    use_trajectories: bool = setting(True, "also train on the accepted trajectories of synthesize")
    steps: int = setting(1000, "optimizer steps; 0 rounds the weights without training", ge=0)
    batch_size: int = setting(64, "packed rows per step", ge=1)
    micro_batch_size: int = setting(1, "rows that pass through the model at once", ge=1)
    context_length: int = setting(8192, "tokens of a packed row; longer dialogs are left out", ge=16)
    precision: Literal["bfloat16", "float32"] = setting("bfloat16", "type of activations; masters are float32")
    lr: float = setting(2e-6, "peak learning rate", gt=0)
    warmup_steps: int = setting(50, "steps of linear warm-up", ge=0)
    final_lr_ratio: float = setting(0.1, "learning rate at the end, relative to the peak", ge=0, le=1)
    temperature: float = setting(
        1.0, "softmax temperature of the distillation from the unquantised model", gt=0, le=100
    )
    optimizer: OptimizerConfig = setting(
        OptimizerConfig(bias_update_speed=0.0, weight_decay=0.0),
        "MuonClip; decay and balancing would move what the teacher has no reason to move",
    )
    checkpoint_steps: int = setting(100, "steps between resumable checkpoints", semantic=False, ge=1)
    evaluation_items: int = setting(2000, "held-out problems for the accuracies with and without INT4", ge=1)
    evaluation_tokens: int = setting(256, "longest answer in an evaluation, in tokens", ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps})")
        return self


def group_problem(model: ModelConfig, group_size: int) -> str | None:
    """Why the experts of a model cannot be cut into groups of this size along their inputs, or None if they can."""
    for name in ("hidden_size", "moe_intermediate_size"):
        width = getattr(model, name)
        if width % group_size:
            return (
                f"quantize.group_size ({group_size}) must divide the model's {name} ({width});"
                f" choose a divisor of it that is a multiple of 8, or make {name} a multiple of {group_size}"
            )
    return None
