"""Three ways to go on from a checkpoint: more supervision, fine-tuning on the model's own right answers, RL.

Demonstrations are a fixed finite set that covers a stated part of the task distribution: problems whose first operand
begins with one of `covered_digits`. RL and rejection sampling get prompts without answers from the whole distribution.
Afterwards every arm answers the same held-out problems; `k2.ablations.answers` compares them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from k2.config.tune import TuneConfig
from k2.data.tokenizer import Tokenizer
from k2.distributed.checkpoint import Checkpoints
from k2.evaluation.harness import MODES, encode_prompt, evaluate_mixture
from k2.evaluation.tasks import Example, get_task, sample_mixture
from k2.execution.contract import Progress
from k2.model.generate import Engine
from k2.model.transformer import Transformer
from k2.rl.critic import RuleCritic
from k2.rl.demonstrations import encode_solution
from k2.rl.rollout import Group, Rollout, RolloutEngine
from k2.rl.sft import demonstration_source, fine_tune
from k2.rl.trainer import Trainer
from k2.serving.chat_template import EncodedChat
from k2.store.work import WorkArea
from k2.training.state import Saver


def covered(example: Example, digits: str) -> bool:
    """Whether demonstrations may show this problem."""
    return str(example.messages[0]["content"]).removeprefix("rev ")[0] in digits


class Tuning:
    """One method from one seed, which decides demonstrations, prompts, sampling and held-out problems."""

    def __init__(self, config: TuneConfig, tokenizer: Tokenizer, progress: Progress) -> None:
        self.config, self.tokenizer, self.progress = config, tokenizer, progress
        seed = {"seed": config.seed}
        self._sft, self._rl = config.sft.model_copy(update=seed), config.rl.model_copy(update=seed)

    def run(self, model: Transformer, work: WorkArea | None = None) -> None:
        """Train `model`; supervision and RL go on from what is in `work`, rejection sampling begins anew.

        Raises:
            StageError: too many updates in a row were skipped, or no answer could be trained on.
        """
        if self.config.method == "rejection":
            self._reject(model)
        elif self.config.method == "sft":
            with _checkpoints(work, self._sft.checkpoint_steps) as checkpoints:
                self._supervise(model, self.demonstrations(), checkpoints)
        else:
            with _checkpoints(work, self._rl.checkpoint_iterations * self._rl.updates) as checkpoints:
                Trainer(self._rl, model, self.tokenizer, RuleCritic()).run(checkpoints, self.progress)

    def demonstrations(self) -> list[EncodedChat]:
        """The first covered problems of the seed, solved."""
        found: list[EncodedChat] = []
        index = 0
        while len(found) < self._sft.demonstrations:
            example = sample_mixture(self._rl.tasks, "train", self.config.seed, index)
            index += 1
            if covered(example, self.config.covered_digits):
                found.append(encode_solution(self.tokenizer, example))
        return found

    def answers(self, model: Transformer) -> dict[str, Any]:
        """Every held-out problem, whether it is covered, and whether the model solved it, sampled and greedy."""
        c, rl, seed = self.config, self._rl, self.config.seed
        heldout = [sample_mixture(rl.tasks, "eval", seed, index) for index in range(c.items)]
        passes: Mapping[str, list[int]] = {
            mode: [
                int(passed)
                for passed in evaluate_mixture(
                    Engine(model), self.tokenizer, rl.tasks, c.items, mode, seed, rl.max_tokens
                ).passes
            ]
            for mode in MODES
        }
        return {
            "prompts": [str(example.messages[0]["content"]) for example in heldout],
            "covered": [int(covered(example, c.covered_digits)) for example in heldout],
            **passes,
        }

    def _supervise(self, model: Transformer, dialogs: Sequence[EncodedChat], checkpoints: Saver | None) -> None:
        source = demonstration_source(self._sft, self.tokenizer, dialogs)
        fine_tune(self._sft, model, source, checkpoints, self.progress)

    def _reject(self, model: Transformer) -> None:
        """In rounds: sample answers, keep the right ones, fine-tune on them."""
        for round_ in range(self.config.rejection_rounds):
            dialogs = self.verified(model, round_)
            if dialogs:
                self._supervise(model, dialogs, None)

    def verified(self, model: Transformer, round_: int) -> list[EncodedChat]:
        """The model's own right answers to the prompts of a round, equal ones once.

        So in Yuan et al. 2023 (arXiv:2308.01825): easy problems would outweigh the others.
        """
        rl, seed = self._rl, self.config.seed
        numbers = range(round_ * self.config.rejection_prompts, (round_ + 1) * self.config.rejection_prompts)
        examples = [sample_mixture(rl.tasks, "train", seed, number) for number in numbers]
        groups = [
            Group({}, encode_prompt(self.tokenizer, example), [Rollout() for _ in range(rl.samples)])
            for example in examples
        ]
        engine = RolloutEngine(self.tokenizer, rl.max_tokens, None)
        engine.advance(Engine(model), groups, rl.temperature, f"rejection/{seed}/{round_}", 0)
        right = [
            (tuple(g.prompt_ids), tuple(r.response_ids))
            for example, g in zip(examples, groups, strict=True)
            for r in g.rollouts
            if r.ended and get_task(example.task).score(example, engine.text(r)) >= 1
        ]
        return [
            EncodedChat([*prompt, *response], [False] * len(prompt) + [True] * len(response))
            for prompt, response in dict.fromkeys(right)
        ]


def _checkpoints(work: WorkArea | None, interval: int) -> AbstractContextManager[Checkpoints | None]:
    return nullcontext() if work is None else Checkpoints(work, interval)
