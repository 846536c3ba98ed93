"""Configuration of the ablation studies."""

from k2.config.base import Section, setting
from k2.config.rl import RlConfig
from k2.config.sft import SftConfig


class RlVsSftConfig(Section):
    """RL against more SFT and rejection sampling from one plateau checkpoint; step counts are fixed here."""

    covered_digits: str = setting("1234", "demonstrations show only problems that begin with these", min_length=1)
    items: int = setting(5000, "held-out problems that every arm answers, per seed", ge=1)
    plateau: SftConfig = setting(SftConfig(), "SFT up to its plateau")
    more_sft: SftConfig = setting(SftConfig(), "the arm that goes on with SFT on the same demonstrations")
    rl: RlConfig = setting(RlConfig(), "the RL arm; its tasks, samples and token budget hold for all arms")
    rejection: SftConfig = setting(SftConfig(), "fine-tuning of one round of rejection sampling")
    rejection_rounds: int = setting(4, "rounds of sampling and fine-tuning", ge=1)
    rejection_prompts: int = setting(1024, "prompts sampled per round", ge=1)
