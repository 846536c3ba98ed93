"""Supervised fine-tuning as a configuration of the training loop."""

from collections.abc import Callable, Sequence
from typing import Any

from k2.config.sft import SftConfig
from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import MODES, MixtureResult, Mode, evaluate_mixture
from k2.execution.contract import Progress
from k2.model.generate import Engine
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.schedule import warmup_cosine
from k2.rl.demonstrations import DemonstrationSource
from k2.serving.chat_template import EncodedChat
from k2.training.batches import NextTokenLoss
from k2.training.loop import train
from k2.training.state import Saver, TrainState


def demonstration_source(
    config: SftConfig, tokenizer: Tokenizer, dialogs: Sequence[EncodedChat]
) -> DemonstrationSource:
    """Packed rows of the dialogs as the configuration wants them."""
    pad = tokenizer.special["[PAD]"]
    return DemonstrationSource(
        dialogs, config.batch_size, config.context_length, config.micro_batch_size, pad, config.seed
    )


def fine_tune(
    config: SftConfig,
    model: Transformer,
    source: DemonstrationSource,
    checkpoints: Saver | None,
    progress: Progress,
    enough: Callable[[], bool] = lambda: False,
) -> TrainState:
    """All steps, from the newest checkpoint if there is one.

    Args:
        enough: asked every `config.validation_steps`; training ends when the model is as good as wanted.
    Raises:
        StageError: too many updates in a row were skipped.
    """
    state = TrainState(model, MuonClip(model.named_parameters(), logical_tensors(model.config), config.optimizer))
    if checkpoints is not None:
        checkpoints.restore(state, source)
    schedule = warmup_cosine(config.lr, config.warmup_steps, config.steps, config.final_lr_ratio)
    rounds = [*range(config.validation_steps, config.steps, config.validation_steps), config.steps]
    for until in (step for step in rounds if step >= state.step):
        train(
            state, source, NextTokenLoss(), lambda _: schedule.lr(state.step + 1),
            until=until, checkpoints=checkpoints, progress=progress, total=config.steps,
        )  # fmt: skip
        if enough():
            break
    return state


def accurate_enough(
    config: SftConfig, model: Transformer, tokenizer: Tokenizer, progress: Progress
) -> Callable[[], bool]:
    """Whether sampled accuracy on validation items, other ones than `accuracy` takes, has reached the target."""
    if config.target_accuracy is None:
        return lambda: False
    target = config.target_accuracy

    def enough() -> bool:
        score = _evaluate(config, model, tokenizer, "sampled", config.validation_items, config.seed + 1).score
        progress.event("validation", **score.json())
        return score.accuracy >= target

    return enough


def accuracy(config: SftConfig, model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Held-out scores of the task mixture: `{"sampled": {...}, "greedy": {...}, "tasks": {...}}`."""
    results = {mode: _evaluate(config, model, tokenizer, mode, config.evaluation_items, config.seed) for mode in MODES}
    scores: dict[str, Any] = {mode: result.score.json() for mode, result in results.items()}
    return scores | {"tasks": {mode: result.by_task() for mode, result in results.items()}}


def _evaluate(
    config: SftConfig, model: Transformer, tokenizer: Tokenizer, mode: Mode, items: int, seed: int
) -> MixtureResult:
    engine, tokens = Engine(model), config.evaluation_tokens
    return evaluate_mixture(engine, tokenizer, config.tasks, items, mode, seed, tokens)
