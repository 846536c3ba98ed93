"""Pretraining. The defaults are Kimi K2's published recipe (report, section 2.5)."""

from typing import Literal, Self

from pydantic import model_validator

from k2.config.base import Section, TrainingSection, setting
from k2.config.model import ModelConfig, Recompute, RopeScaling
from k2.config.optimizer import OptimizerConfig
from k2.config.parallel import ParallelConfig


class DataConfig(Section):
    """What a run reads of the tokenized corpus, and how."""

    mixture: dict[str, float] = setting(
        {}, "domain -> weight in tokens; empty takes all domains in proportion to the tokens they have"
    )
    prefetch_steps: int = setting(8, "steps whose rows are made ahead", semantic=False, ge=0)
    cache_mb: int = setting(8192, "MiB of tokens a rank keeps in memory", semantic=False, ge=1)
    patience_s: float = setting(900.0, "how long a rank waits for a store that is away", semantic=False, ge=0)

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if any(weight <= 0 for weight in self.mixture.values()):
            raise ValueError(f"mixture: weights must be positive, got {self.mixture}; leave out domains not wanted")
        return self


class PretrainConfig(TrainingSection):
    """Warm-up, stable, decay, annealing, then a long-context phase under YaRN; all lengths in tokens."""

    model: ModelConfig = setting(ModelConfig(), "architecture; rope_scaling stays null, the long-context phase sets it")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "MuonClip")
    data: DataConfig = setting(DataConfig(), "what is read of the corpus")
    lr: float = setting(2e-4, "peak learning rate", gt=0)
    decayed_lr_ratio: float = setting(0.1, "learning rate after the cosine decay, as a share of the peak", ge=0, le=1)
    final_lr_ratio: float = setting(0.035, "learning rate at the very end, as a share of the peak", ge=0, le=1)
    warmup_tokens: int = setting(33_554_432_000, "linear warm-up (500 steps)", ge=0)
    stable_tokens: int = setting(9_966_445_568_000, "constant learning rate after warm-up", ge=0)
    decay_tokens: int = setting(5_500_000_000_000, "cosine decay", ge=0)
    annealing_tokens: int = setting(400_000_000_000, "linear annealing at the short context", ge=0)
    long_context_tokens: int = setting(60_000_000_000, "annealing continued at the long context under YaRN", ge=0)
    context_length: int = setting(4096, "tokens per row before the long-context phase", ge=8)
    long_context_length: int = setting(32768, "tokens per row in the long-context phase", ge=8)
    yarn: RopeScaling = setting(RopeScaling(), "YaRN of the long-context phase and of the finished model")
    batch_tokens: int = setting(67_108_864, "tokens per step; a multiple of both context lengths", ge=8)
    micro_batch_tokens: int = setting(32768, "tokens that pass through the model at once", ge=8)
    mask_documents: bool = setting(
        False, "keep tokens from attending to other documents of a row; DeepSeek-V3 does not"
    )
    balance_loss_weight: float = setting(1e-4, "weight of the sequence-wise balance loss (DeepSeek-V3's alpha)", ge=0)
    precision: Literal["bfloat16", "float32"] = setting("bfloat16", "type of activations; masters are float32")
    param_dtype: Literal["bfloat16", "float32"] = setting(
        "float32", "type of the weights that are computed with; of bfloat16 ones the optimizer has float32 masters"
    )
    recompute: tuple[Recompute, ...] = setting(
        (), "what the backward pass computes again instead of keeping it; changes no bit", semantic=False
    )
    fp8_storage: bool = setting(
        False,
        "keep inputs of MoE up-projections and SwiGLU for the backward pass as FP8 E4M3, a scale for 128 values",
    )
    offload_activations: bool = setting(
        False, "keep what else the backward pass needs on the host; changes no bit", semantic=False
    )
    heldout_tokens: int = setting(4_194_304, "held-out tokens that the loss is measured on", ge=8)
    curve_points: int = setting(400, "points of the report's curves at most", ge=1)
    checkpoint_interval: int = setting(100, "steps between checkpoints", semantic=False, ge=1)
    parallel: ParallelConfig = setting(ParallelConfig(), "how ranks under torchrun divide the work", semantic=False)
    threads: int | None = setting(None, "CPU threads; null leaves torch's choice", semantic=False, ge=1)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return -(-self.total_tokens // self.batch_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens of all phases."""
        return (
            self.warmup_tokens
            + self.stable_tokens
            + self.decay_tokens
            + self.annealing_tokens
            + self.long_context_tokens
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.total_tokens == 0:
            raise ValueError("at least one of the phases (warmup_tokens ... long_context_tokens) must hold tokens")
        if self.model.rope_scaling is not None:
            raise ValueError("model.rope_scaling must be null: the long-context phase takes it from yarn")
        self._check_length("context_length", self.context_length, self.model.max_position_embeddings)
        if self.long_context_tokens:
            reach = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
            self._check_length("long_context_length", self.long_context_length, reach)
        return self

    def _check_length(self, name: str, length: int, reach: int) -> None:
        if length > reach:
            raise ValueError(f"{name} ({length}) must be at most the positions the model reaches ({reach})")
        if self.batch_tokens % length:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) must be a multiple of {name} ({length})")
        if self.micro_batch_tokens < length:
            raise ValueError(f"micro_batch_tokens ({self.micro_batch_tokens}) must be at least {name} ({length})")
