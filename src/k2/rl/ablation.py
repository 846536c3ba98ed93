"""RL against more supervision, from one checkpoint at which supervision has stopped helping.

Demonstrations are a fixed finite set that covers a stated part of the task distribution: problems whose first operand
begins with one of `covered_digits`. SFT trains on them to its plateau. From that checkpoint three arms run with step
counts fixed in the configuration: `rl` on prompts without answers from the whole distribution, `sft` on the same
demonstrations, `rejection` (fine-tuning on the model's own verified answers to the same prompts as RL). Every arm
answers the same held-out problems. `k2.rl.ablation_report` compares the answers.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from k2.config.ablation import RlVsSftConfig
from k2.config.sft import SftConfig
from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import MODES, MixtureResult, Mode, encode_prompt, evaluate_mixture
from k2.evaluation.tasks import Example, get_task, sample_mixture
from k2.execution.contract import Progress
from k2.model import hf
from k2.model.generate import Engine
from k2.model.transformer import Transformer
from k2.monitoring.events import progress_for
from k2.rl.critic import RuleCritic
from k2.rl.demonstrations import encode_solution
from k2.rl.rollout import Group, Rollout, RolloutEngine
from k2.rl.sft import demonstration_source, fine_tune
from k2.rl.trainer import Trainer
from k2.serving.chat_template import EncodedChat
from k2.store.artifacts import open_uri
from k2.store.client import Store

ARMS = ("rl", "sft", "rejection")


def covered(example: Example, digits: str) -> bool:
    """Whether demonstrations may show this problem."""
    return str(example.messages[0]["content"]).removeprefix("rev ")[0] in digits


def run_seed(
    config: RlVsSftConfig, base: Transformer, tokenizer: Tokenizer, seed: int, progress: Progress
) -> dict[str, Any]:
    """One seed of the study, JSON-ready: passes per held-out item and CPU seconds for the plateau and each arm."""
    study = _Study(config, tokenizer, seed, progress)
    plateau, start = copy.deepcopy(base), time.process_time()
    study.supervise(plateau, study.demonstrations(), config.plateau)
    result: dict[str, Any] = {"seed": seed, "cpu_s": {"plateau": time.process_time() - start}}
    result["plateau"] = study.answers(plateau)
    arms: Mapping[str, Callable[[Transformer], None]] = {
        "rl": study.reinforce,
        "sft": lambda model: study.supervise(model, study.demonstrations(), config.more_sft),
        "rejection": study.reject,
    }
    for arm in ARMS:
        model, start = copy.deepcopy(plateau), time.process_time()
        arms[arm](model)
        result["cpu_s"][arm] = time.process_time() - start
        result[arm] = study.answers(model)
    result["prompts"] = [str(example.messages[0]["content"]) for example in study.heldout]
    result["covered"] = [covered(example, config.covered_digits) for example in study.heldout]
    return result


class _Study:
    """What the arms of one seed share."""

    def __init__(self, config: RlVsSftConfig, tokenizer: Tokenizer, seed: int, progress: Progress) -> None:
        self.config, self.tokenizer, self.seed, self.progress = config, tokenizer, seed, progress
        self.heldout = [sample_mixture(config.rl.tasks, "eval", seed, index) for index in range(config.items)]

    def demonstrations(self) -> list[EncodedChat]:
        """The first `plateau.demonstrations` covered problems of the seed, solved."""
        found: list[EncodedChat] = []
        index = 0
        while len(found) < self.config.plateau.demonstrations:
            example = sample_mixture(self.config.rl.tasks, "train", self.seed, index)
            index += 1
            if covered(example, self.config.covered_digits):
                found.append(encode_solution(self.tokenizer, example))
        return found

    def supervise(self, model: Transformer, dialogs: Sequence[EncodedChat], config: SftConfig) -> None:
        """Fine-tune on dialogs."""
        seeded = config.model_copy(update={"seed": self.seed})
        source = demonstration_source(seeded, self.tokenizer, dialogs)
        fine_tune(seeded, model, source, None, self.progress)

    def reinforce(self, model: Transformer) -> None:
        """RL without demonstrations."""
        config = self.config.rl.model_copy(update={"seed": self.seed})
        Trainer(config, model, self.tokenizer, RuleCritic()).run(None, self.progress)

    def reject(self, model: Transformer) -> None:
        """In rounds: sample answers, keep the right ones, fine-tune on them."""
        for round_ in range(self.config.rejection_rounds):
            dialogs = self._verified(model, round_)
            if dialogs:
                self.supervise(model, dialogs, self.config.rejection)

    def answers(self, model: Transformer) -> dict[str, list[int]]:
        """Whether each held-out problem was solved, sampled and greedy."""
        return {mode: [int(passed) for passed in self._evaluate(model, mode).passes] for mode in MODES}

    def _evaluate(self, model: Transformer, mode: Mode) -> MixtureResult:
        c, tokens = self.config, self.config.rl.max_tokens
        return evaluate_mixture(Engine(model), self.tokenizer, c.rl.tasks, c.items, mode, self.seed, tokens)

    def _verified(self, model: Transformer, round_: int) -> list[EncodedChat]:
        rl = self.config.rl
        numbers = range(round_ * self.config.rejection_prompts, (round_ + 1) * self.config.rejection_prompts)
        examples = [sample_mixture(rl.tasks, "train", self.seed, number) for number in numbers]
        groups = [
            Group({}, encode_prompt(self.tokenizer, example), [Rollout() for _ in range(rl.samples)])
            for example in examples
        ]
        engine = RolloutEngine(Engine(model), self.tokenizer, rl.max_tokens, None)
        engine.advance(groups, rl.temperature, f"rejection/{self.seed}/{round_}", 0)
        right = [
            (tuple(g.prompt_ids), tuple(r.response_ids))
            for example, g in zip(examples, groups, strict=True)
            for r in g.rollouts
            if r.ended and get_task(example.task).score(example, engine.text(r)) >= 1
        ]
        # Equal answers count once, as in Yuan et al. 2023 (arXiv:2308.01825): easy problems would outweigh the others.
        return [
            EncodedChat([*prompt, *response], [False] * len(prompt) + [True] * len(response))
            for prompt, response in dict.fromkeys(right)
        ]


def run_component(config_json: str, model_uri: str, seed: int) -> str:
    """One seed for the pipeline component: checkpoint by URI in, result as JSON out."""
    config = RlVsSftConfig.model_validate_json(config_json)
    folder = open_uri(Store.from_environment(), model_uri).directory()
    result = run_seed(config, hf.load(folder), Tokenizer.load(folder / "tokenizer"), seed, progress_for("rl_vs_sft"))
    return json.dumps(result, sort_keys=True)
