"""One arm of a study that goes on from a checkpoint."""

from typing import Literal

from k2.config.base import TrainingSection, setting
from k2.config.rl import RlConfig
from k2.config.sft import SftConfig


class TuneConfig(TrainingSection):
    """Supervision on some of a task's problems, rejection sampling or RL on all of them; step counts are fixed."""

    method: Literal["sft", "rejection", "rl"] = setting("sft", "how the model is trained")
    sft: SftConfig = setting(SftConfig(), "supervision, and fine-tuning of one round of rejection sampling")
    rl: RlConfig = setting(RlConfig(), "RL; its tasks, samples and token budget hold for every method")
    covered_digits: str = setting("1234", "demonstrations show only problems that begin with these", min_length=1)
    rejection_rounds: int = setting(4, "rounds of sampling and fine-tuning", ge=1)
    rejection_prompts: int = setting(1024, "prompts sampled per round", ge=1)
    items: int = setting(5000, "held-out problems answered at the end", ge=1)
