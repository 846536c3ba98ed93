"""INT4 quantisation-aware training of the routed experts, as Kimi K2 Thinking's model card describes it."""

from typing import Self

from pydantic import model_validator

from k2.config.base import StageSection, setting
from k2.config.optimizer import OptimizerConfig


class QuantizeConfig(StageSection):
    """How the routed experts learn to live with four bits. Length and rate of K2's own QAT are not published."""

    group_size: int = setting(
        32, "weights that share one scale; divides hidden_size and moe_intermediate_size", ge=8, multiple_of=8
    )
    steps: int = setting(1000, "optimizer steps; 0 rounds the weights without training", ge=0)
    batch_size: int = setting(64, "conversations per step", ge=1)
    micro_batch_size: int = setting(8, "conversations that pass through the model at once", ge=1)
    context_length: int = setting(4096, "longest conversation in tokens; longer ones are left out", ge=8)
    lr: float = setting(2e-6, "peak learning rate", gt=0)
    warmup_steps: int = setting(50, "steps of linear warm-up", ge=0)
    final_lr_ratio: float = setting(0.1, "learning rate at the end, relative to the peak", ge=0, le=1)
    tasks: dict[str, float] = setting(
        {"addition_2": 1.0, "tool_call": 1.0}, "verifiable tasks whose solved prompts are trained on, with weights"
    )
    trajectory_share: float = setting(0.25, "share of conversations taken from the trajectories", ge=0, le=1)
    temperature: float = setting(
        1.0, "softmax temperature of the distillation from the unquantised model", gt=0, le=100
    )
    optimizer: OptimizerConfig = setting(
        OptimizerConfig(bias_update_speed=0.0), "MuonClip; the routers' biases stay as they are"
    )
    checkpoint_steps: int = setting(100, "steps between resumable checkpoints", semantic=False, ge=1)
    evaluation_items: int = setting(2000, "held-out prompts of each task for the accuracies before and after", ge=1)
    evaluation_tokens: int = setting(256, "longest answer in an evaluation, in tokens", ge=1)
    evaluation_batch: int = setting(64, "answers generated at once", semantic=False, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size ({self.micro_batch_size}) must divide batch_size ({self.batch_size})")
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps})")
        if not self.tasks:
            raise ValueError("tasks must name at least one task")
        return self
