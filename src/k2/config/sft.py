"""Supervised fine-tuning."""

from k2.config.base import TrainingSection, setting
from k2.config.optimizer import OptimizerConfig


class SftConfig(TrainingSection):
    """Fine-tuning on verifiable tasks and accepted trajectories, loss on what the assistant says (report 3.1)."""

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
        "verifiable tasks whose solutions are demonstrated, with their weights",
        min_length=1,
    )
    demonstrations: int = setting(1_000_000, "size of the fixed set of demonstrated solutions", ge=1)
    use_trajectories: bool = setting(True, "also train on the accepted trajectories of synthesize")
    max_trajectories: int | None = setting(None, "use at most this many trajectories; null takes all", ge=1)
    context_length: int = setting(32768, "tokens of a packed row; longer dialogs are counted and dropped", ge=16)
    batch_size: int = setting(64, "rows per step", ge=1)
    micro_batch_size: int = setting(1, "rows that pass through the model at once", ge=1)
    steps: int = setting(5000, "optimizer steps, at most", ge=1)
    target_accuracy: float | None = setting(
        None, "stop at this sampled accuracy on validation items, to leave RL something to learn; null makes all steps",
        gt=0, le=1,
    )  # fmt: skip
    validation_steps: int = setting(100, "steps between looks at the validation items", ge=1)
    validation_items: int = setting(300, "validation items, other ones than evaluation's", ge=1)
    lr: float = setting(2e-5, "peak learning rate", gt=0)
    final_lr_ratio: float = setting(0.1, "learning rate at the end, as a share of the peak", ge=0, le=1)
    warmup_steps: int = setting(100, "steps of linear warm-up", ge=0)
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "MuonClip")
    evaluation_items: int = setting(1000, "held-out items that accuracy is measured on", ge=1)
    evaluation_tokens: int = setting(256, "longest answer in evaluation, in tokens", ge=1)
    checkpoint_steps: int = setting(100, "steps between checkpoints", semantic=False, ge=1)
