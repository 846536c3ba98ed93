"""Rollouts: the policy answers prompts in groups; what it wrote is trained on as it is, token for token.

A segment limit makes long answers grow over several iterations (partial rollout); each token keeps the version of the
policy that made it.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import answer_text, generate_by_length
from k2.model.generate import Engine, Sample
from k2.model.sampling import SamplingConfig
from k2.serving.chat_template import IM_END


@dataclass
class Rollout:
    """One answer on its way or finished.

    logprobs: natural logarithm under the sampling distribution of the moment, one per token of the response.
    versions: the policy version (optimizer steps made) that wrote each token.
    ended: the policy ended it itself; an answer that is cut off by its budget is finished but has not ended.
    """

    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def valid(self) -> bool:
        """Whether every log-probability is a number; a sample of which one is not cannot be trained on."""
        return all(math.isfinite(value) for value in self.logprobs)

    def finished(self, budget: int) -> bool:
        """Whether nothing more is to be generated."""
        return self.ended or len(self.response_ids) >= budget or not self.valid

    def extend(self, sample: Sample, version: int) -> None:
        """Append what the engine generated."""
        self.response_ids += sample.token_ids
        self.logprobs += sample.logprobs
        self.versions += [version] * len(sample.token_ids)
        self.ended = sample.finish_reason == "stop"


@dataclass
class Group:
    """The K answers to one prompt. `prompt` names where the prompt came from, JSON-ready."""

    prompt: dict[str, Any]
    prompt_ids: list[int]
    rollouts: list[Rollout]

    def json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Group":
        """From a checkpoint."""
        return cls(value["prompt"], value["prompt_ids"], [Rollout(**rollout) for rollout in value["rollouts"]])


class RolloutEngine:
    """Advances groups, within a token budget and, if set, a segment per call."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, segment_tokens: int | None) -> None:
        self._tokenizer = tokenizer
        self._budget, self._segment = max_tokens, segment_tokens or max_tokens
        self._stop = (tokenizer.special[IM_END],)

    def advance(self, engine: Engine, groups: Sequence[Group], temperature: float, seed: str, version: int) -> None:
        """Generate up to one segment for every unfinished answer; a new group runs its prompt once for all.

        `version` is that of the policy in `engine`.
        """
        fresh = [group for group in groups if not any(rollout.response_ids for rollout in group.rollouts)]
        begun = [group for group in groups if any(rollout.response_ids for rollout in group.rollouts)]
        self._begin(engine, fresh, temperature, seed, version)
        self._continue(engine, begun, temperature, seed, version)

    def text(self, rollout: Rollout) -> str:
        """What the answer says, without its end token."""
        return answer_text(self._tokenizer, rollout.response_ids)

    def finished(self, group: Group) -> bool:
        """Whether the whole group is ready to be judged."""
        return all(rollout.finished(self._budget) for rollout in group.rollouts)

    def _begin(self, engine: Engine, groups: Sequence[Group], temperature: float, seed: str, version: int) -> None:
        if not groups:
            return
        limit = min(self._segment, self._budget)
        # Equal prompts would share a random stream, so each group has a seed of its own.
        sampling = [self._sampling(temperature, f"{seed}/begin/{i}", limit) for i in range(len(groups))]
        prompts, count = [group.prompt_ids for group in groups], len(groups[0].rollouts)
        sampled = generate_by_length(engine, prompts, count, sampling)
        for group, samples in zip(groups, sampled, strict=True):
            for rollout, sample in zip(group.rollouts, samples, strict=True):
                rollout.extend(sample, version)

    def _continue(self, engine: Engine, groups: Sequence[Group], temperature: float, seed: str, version: int) -> None:
        open_ = [(g, r) for g in groups for r in g.rollouts if not r.finished(self._budget)]
        prompts = [group.prompt_ids + rollout.response_ids for group, rollout in open_]
        limits = [min(self._segment, self._budget - len(rollout.response_ids)) for _, rollout in open_]
        sampling = [self._sampling(temperature, f"{seed}/continue/{i}", limit) for i, limit in enumerate(limits)]
        sampled = generate_by_length(engine, prompts, 1, sampling)
        for (_, rollout), (sample,) in zip(open_, sampled, strict=True):
            rollout.extend(sample, version)

    def _sampling(self, temperature: float, stream: str, max_tokens: int) -> SamplingConfig:
        seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:6], "big")
        return SamplingConfig(max_tokens, temperature, seed=seed, stop_ids=self._stop)
