"""RL as a configuration of the training loop: data from the live policy, K2's objective, accuracy before and after."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from k2.config.rl import RlConfig
from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import MODES, MixtureResult, Mode, encode_prompt, evaluate_mixture
from k2.execution.contract import Progress
from k2.generation.protocol import Message
from k2.model.generate import Engine
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.schedule import warmup_cosine
from k2.rl.critic import Critic
from k2.rl.demonstrations import DemonstrationSource, task_demonstrations
from k2.rl.objective import policy_loss
from k2.rl.policy import Policy
from k2.rl.prompts import Prompts, general_example
from k2.rl.rewards import Judge
from k2.rl.rollout import RolloutEngine
from k2.rl.source import RolloutSource
from k2.training.loop import train
from k2.training.state import Saver, TrainState

SHOWN = 8
"""Held-out problems whose answers before and after appear in the report."""


class Trainer:
    """One RL run. The notes of its state hold what was measured, so that a resumed run does not measure again."""

    def __init__(
        self,
        config: RlConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        critic: Critic,
        general: Sequence[Sequence[Message]] = (),
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        optimizer = MuonClip(model.named_parameters(), logical_tensors(model.config), config.optimizer)
        self.state = TrainState(model, optimizer)
        self.policy = Policy(self.state)
        short = [r for r in general if len(encode_prompt(tokenizer, general_example(r))) <= config.max_prompt_tokens]
        self.source = RolloutSource(
            config,
            self.state,
            tokenizer,
            self.policy,
            RolloutEngine(tokenizer, config.max_tokens, config.segment_tokens),
            Prompts(config.tasks, short, config.general_share, config.seed),
            Judge(config.reward, critic),
            self._ptx(),
        )

    def run(self, checkpoints: Saver | None, progress: Progress) -> TrainState:
        """All iterations, from the newest checkpoint if there is one, and the accuracies on the way.

        Raises:
            StageError: too many updates in a row were skipped, or no answer could be trained on.
        """
        c = self.config
        if checkpoints is not None:
            checkpoints.restore(self.state, self.source)
        steps = c.iterations * c.updates
        schedule = warmup_cosine(c.lr, c.warmup_steps, steps, c.final_lr_ratio)
        points = [*range(0, steps, c.evaluation_interval * c.updates), steps]
        for start, end in pairwise(points):
            self._measure(start, c.evaluation_items if start == 0 else c.evaluation_curve_items)
            train(
                self.state, self.source, policy_loss(c.tau, c.ptx_coefficient),
                lambda _: schedule.lr(self.state.step + 1),
                until=end, total=steps, checkpoints=checkpoints, progress=progress,
            )  # fmt: skip
        self._measure(steps, c.evaluation_items)
        return self.state

    def _ptx(self) -> DemonstrationSource | None:
        c = self.config
        if c.ptx_coefficient == 0:
            return None
        dialogs = task_demonstrations(self.tokenizer, c.tasks, c.ptx_demonstrations, c.seed)
        pad = self.tokenizer.special["[PAD]"]
        return DemonstrationSource(dialogs, c.ptx_batch_size, c.ptx_context_length, c.ptx_batch_size, pad, c.seed)

    def _measure(self, step: int, items: int) -> None:
        """Note the held-out accuracy at a step, unless a checkpoint brought it along."""
        notes = self.state.notes.setdefault("accuracy", [])
        if self.state.step != step or any(note["step"] == step for note in notes):
            return
        with self.policy.turn() as engine:
            results = {mode: self._evaluate(engine, mode, items) for mode in MODES}
        notes.append(
            {"step": step}
            | {mode: result.score.json() for mode, result in results.items()}
            | {"tasks": {mode: result.by_task() for mode, result in results.items()}}
            | {"shown": _shown(results["greedy"])}
        )

    def _evaluate(self, engine: Engine, mode: Mode, items: int) -> MixtureResult:
        c = self.config
        return evaluate_mixture(engine, self.tokenizer, c.tasks, items, mode, c.seed, c.max_tokens)


def _shown(result: MixtureResult) -> list[dict[str, Any]]:
    rows = zip(result.examples[:SHOWN], result.texts, result.passes, strict=False)
    return [{"prompt": e.messages[-1]["content"], "answer": text, "passed": passed} for e, text, passed in rows]


def metrics_of(state: TrainState) -> dict[str, Any]:
    """`reward_first reward_last accuracy_before accuracy_after` (sampled), each score in full, and the gap."""
    rewards, gaps = state.history.curve("reward"), state.history.curve("logprob_gap")
    before, after = state.notes["accuracy"][0], state.notes["accuracy"][-1]
    return {
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
        "accuracy_before": before["sampled"]["accuracy"],
        "accuracy_after": after["sampled"]["accuracy"],
        "before": {mode: before[mode] for mode in MODES},
        "after": {mode: after[mode] for mode in MODES},
        "logprob_gap": gaps[-1],
        "logprob_gap_max": max(state.history.curve("logprob_gap_max")),
    }


def report_of(state: TrainState) -> dict[str, Any]:
    """Curves of reward, accuracy and the gap, and held-out answers before and after."""
    notes = state.notes["accuracy"]
    pairs = zip(notes[0]["shown"], notes[-1]["shown"], strict=True)
    return {
        "curves": state.history.curves(),
        "accuracy": [{name: value for name, value in note.items() if name != "shown"} for note in notes],
        "examples": [
            {"prompt": old["prompt"], "before": old["answer"], "after": new["answer"], "passed": new["passed"]}
            for old, new in pairs
        ],
    }
