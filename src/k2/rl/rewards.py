"""From answers to rewards, and from rewards to what the objective needs; torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2.config.rl import RewardConfig
from k2.evaluation.tasks import Example
from k2.rl.critic import Critic, win_rates
from k2.rl.environments import TaskEnvironment
from k2.rl.prompts import GENERAL


@dataclass(frozen=True)
class Verdict:
    """The reward of one answer and the parts it is made of."""

    reward: float
    parts: Mapping[str, float]

    def agreement(self, others: Sequence["Verdict"]) -> tuple[float, int]:
        """How often the critic's order is the verifier's, a tie counting half, and of how many other answers.

        Answers that the verifier finds equal, or that it cannot check, have no order.
        """
        pairs = [
            (self.parts["verifier"] - other.parts["verifier"], self.parts["rubric"] - other.parts["rubric"])
            for other in others
            if self.parts.get("verifier") != other.parts.get("verifier")
        ]
        return sum(0.5 if rubric == 0 else float((rubric > 0) == (truth > 0)) for truth, rubric in pairs), len(pairs)


class Judge:
    """Scores a group of answers: the task's verifier, and the win rate among them by the critic."""

    def __init__(self, config: RewardConfig, critic: Critic) -> None:
        self._config, self._critic, self._environment = config, critic, TaskEnvironment()

    def judge(self, example: Example, texts: Sequence[str], truncated: Sequence[bool]) -> list[Verdict]:
        """One verdict per answer. A group of one has nobody to win against; its rubric part is 0.5."""
        rates = [0.5] * len(texts)
        if self._config.rubric > 0 and len(texts) > 1:
            rates = win_rates(self._critic, example.messages, texts)
        verdicts = []
        for text, rate, cut in zip(texts, rates, truncated, strict=True):
            parts = {"rubric": rate, **self._verified(example, text)}
            verdicts.append(Verdict(total_reward(self._config, parts, truncated=cut), parts))
        return verdicts

    def _verified(self, example: Example, text: str) -> Mapping[str, float]:
        if example.task == GENERAL:
            return {}
        self._environment.reset(example)
        return self._environment.step({"role": "assistant", "content": text}).rewards


def total_reward(config: RewardConfig, parts: Mapping[str, float], *, truncated: bool) -> float:
    """Weighted sum of the parts; an answer cut off by its token budget pays the penalty (report 3.2.3)."""
    weights = {"verifier": config.verifier, "rubric": config.rubric}
    return sum(weights[name] * value for name, value in parts.items()) - config.budget_penalty * truncated


def centred(rewards: Sequence[float]) -> list[float]:
    """Rewards of one group minus their mean, K2's only baseline."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def decayed(first: float, last: float, step: int, steps: int) -> float:
    """Linear way from `first` at step 0 to `last` at step `steps - 1`: the temperature's decay."""
    return first + (last - first) * step / max(1, steps - 1)
