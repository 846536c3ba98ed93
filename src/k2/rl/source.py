"""The data of RL: each step's batches come from the live policy's own answers.

One iteration samples prompts, advances rollouts, judges finished groups and cuts them into `updates` optimizer steps.
Between iterations the position is a few numbers and the groups that are still growing, so a killed run goes on exactly.

Letters in shapes: B samples, L length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2.config.rl import RlConfig
from k2.data.tokenizer import Tokenizer
from k2.errors import StageError
from k2.evaluation.harness import encode_prompt
from k2.rl.demonstrations import DemonstrationSource
from k2.rl.objective import PtxBatch, RolloutBatch, response_logprobs
from k2.rl.policy import Policy
from k2.rl.prompts import Prompts
from k2.rl.rewards import Judge, Verdict, centred, decayed
from k2.rl.rollout import Group, Rollout, RolloutEngine
from k2.training.state import TrainState

Update = list[RolloutBatch | PtxBatch]


@dataclass(frozen=True)
class Graded:
    """One answer ready to be trained on."""

    group: Group
    rollout: Rollout
    verdict: Verdict
    agreement: tuple[float, int]
    advantage: float

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.group.prompt_ids) + len(self.rollout.response_ids)


class RolloutSource:
    """Steps of rollout batches made by the policy in `state`; a `k2.training.state.Source`."""

    def __init__(
        self,
        config: RlConfig,
        state: TrainState,
        tokenizer: Tokenizer,
        policy: Policy,
        engine: RolloutEngine,
        prompts: Prompts,
        judge: Judge,
        ptx: DemonstrationSource | None,
    ) -> None:
        self._config, self._state, self._tokenizer = config, state, tokenizer
        self._policy, self._engine = policy, engine
        self._prompts, self._judge, self._ptx = prompts, judge, ptx
        self._iteration, self._drawn = 0, 0
        self._growing: list[Group] = []
        self._updates: list[Update] = []
        self.failed = 0

    @property
    def temperature(self) -> float:
        """Of the iteration that is being sampled (report 3.2.3: high at first, then decayed)."""
        c = self._config
        return decayed(c.temperature, c.final_temperature, self._iteration, c.iterations)

    def next_step(self) -> Sequence[RolloutBatch | PtxBatch]:
        """The micro-batches of one optimizer step; begins an iteration where the last one is used up."""
        if not self._updates:
            self._updates = self._iterate()
        return self._updates.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """The position between two iterations.

        Raises:
            StageError: an iteration is under way.
        """
        if self._updates:
            raise StageError("RL can be saved between iterations only")
        return {
            "iteration": self._iteration,
            "drawn": self._drawn,
            "failed": self.failed,
            "growing": [group.json() for group in self._growing],
            "ptx": self._ptx.state_dict() if self._ptx else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self._iteration, self._drawn, self.failed = state["iteration"], state["drawn"], state["failed"]
        self._growing = [Group.from_json(value) for value in state["growing"]]
        if self._ptx:
            self._ptx.load_state_dict(state["ptx"])

    def _iterate(self) -> list[Update]:
        if self._config.reset_optimizer:
            _reset(self._state)
        self._state.model.eval()
        graded = self._grade(self._roll_out())
        temperature = self.temperature
        self._iteration += 1
        groups = list({id(answer.group): answer.group for answer in graded}.values())
        size = -(-len(groups) // self._config.updates)
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        return [self._update([a for a in graded if a.group in part], temperature) for part in parts]

    def _roll_out(self) -> list[Group]:
        """Fill up with new prompts and advance until some group is finished."""
        while len(self._growing) < self._config.prompts:
            name = self._prompts.name(self._drawn)
            prompt_ids = encode_prompt(self._tokenizer, self._prompts.example(name))
            self._growing.append(Group(name, prompt_ids, [Rollout() for _ in range(self._config.samples)]))
            self._drawn += 1
        finished: list[Group] = []
        round_ = 0
        with self._policy.turn() as engine:
            while not finished:
                seed = f"{self._config.seed}/{self._iteration}/{round_}"
                self._engine.advance(engine, self._growing, self.temperature, seed, self._policy.version)
                finished = [group for group in self._growing if self._engine.finished(group)]
                round_ += 1
        self._growing = [group for group in self._growing if not self._engine.finished(group)]
        return finished

    def _grade(self, groups: Sequence[Group]) -> list[Graded]:
        """Judge the answers; those with a log-probability that is not a number fail alone, and are counted."""
        graded = []
        for group in groups:
            valid = [rollout for rollout in group.rollouts if rollout.valid]
            self.failed += len(group.rollouts) - len(valid)
            texts = [self._engine.text(rollout) for rollout in valid]
            verdicts = self._judge.judge(self._prompts.example(group.prompt), texts, [not r.ended for r in valid])
            advantages = centred([verdict.reward for verdict in verdicts])
            agreements = [verdict.agreement(verdicts) for verdict in verdicts]
            graded += [Graded(group, *row) for row in zip(valid, verdicts, agreements, advantages, strict=True)]
        if not graded:
            raise StageError(f"iteration {self._iteration}: every answer has a log-probability that is not a number")
        return graded

    def _update(self, answers: list[Graded], temperature: float) -> Update:
        """Micro-batches of similar length, and the demonstrations of the PTX loss."""
        cut = _micro_batches(answers, self._config.micro_batch_tokens)
        batches: Update = [self._batch(part, temperature) for part in cut]
        if self._ptx:
            batches += [PtxBatch(batch, len(answers)) for batch in self._ptx.next_step()]
        return batches

    def _batch(self, answers: Sequence[Graded], temperature: float) -> RolloutBatch:
        tokens_BL = torch.zeros(len(answers), max(answer.length for answer in answers), dtype=torch.int64)
        response_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
        keep_BL = torch.zeros_like(response_BL)
        logprobs_BL = torch.zeros(tokens_BL.shape)
        for row, answer in enumerate(answers):
            start = len(answer.group.prompt_ids)
            tokens_BL[row, : answer.length] = torch.tensor(answer.group.prompt_ids + answer.rollout.response_ids)
            response_BL[row, start : answer.length] = True
            keep_BL[row, : answer.length] = True
            logprobs_BL[row, start : answer.length] = torch.tensor(answer.rollout.logprobs)
        batch = RolloutBatch(
            tokens_BL=tokens_BL,
            response_BL=response_BL,
            keep_BL=keep_BL,
            rollout_logprobs_BL=logprobs_BL,
            advantages_B=torch.tensor([answer.advantage for answer in answers]),
            measures=self._measures(answers),
            temperature=temperature,
        )
        return batch.with_old(self._old_logprobs(batch))

    def _old_logprobs(self, batch: RolloutBatch) -> Tensor | None:
        """log pi_old: as the rollout engine said, or by the trainer's own forward pass before the first update."""
        if self._config.old_policy == "rollout":
            return batch.rollout_logprobs_BL.sum(1)
        if self._config.updates == 1:
            return None
        with torch.no_grad():
            return response_logprobs(self._state.model, batch)[0].sum(1)

    def _measures(self, answers: Sequence[Graded]) -> dict[str, Tensor]:
        rows = [
            {
                "reward": answer.verdict.reward,
                "verifier": answer.verdict.parts.get("verifier", 0.0),
                "rubric": answer.verdict.parts["rubric"],
                "critic_agreed": answer.agreement[0],
                "critic_pairs": float(answer.agreement[1]),
                "truncated": float(not answer.rollout.ended),
                "response_tokens": float(len(answer.rollout.response_ids)),
                "policy_age": self._state.step - sum(answer.rollout.versions) / len(answer.rollout.versions),
            }
            for answer in answers
        ]
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _micro_batches(answers: Sequence[Graded], tokens: int) -> list[list[Graded]]:
    """Answers by length, as many together as fit into `tokens` when padded to the longest; at least one."""
    parts: list[list[Graded]] = []
    for answer in sorted(answers, key=lambda answer: answer.length):
        if not parts or (len(parts[-1]) + 1) * answer.length > tokens:
            parts.append([])
        parts[-1].append(answer)
    return parts


def _reset(state: TrainState) -> None:
    """Forget momenta and AdamW's averages; weights and QK-Clip counters stay."""
    forgotten = ("momentum.", "exp_avg", "steps")
    values = state.optimizer.state_dict()
    fresh = {name: torch.zeros_like(t) if name.startswith(forgotten) else t for name, t in values.items()}
    state.optimizer.load_state_dict(fresh)
