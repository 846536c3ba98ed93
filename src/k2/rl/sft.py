"""Supervised fine-tuning as a configuration of the training loop."""

from collections.abc import Sequence
from typing import Any

from k2.config.sft import SftConfig
from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import MODES, evaluate_mixture
from k2.execution.contract import Progress
from k2.model.generate import Engine
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.schedule import warmup_cosine
from k2.rl.demonstrations import DemonstrationSource
from k2.serving.chat_template import EncodedChat
from k2.training.batches import next_token_loss
from k2.training.checkpoint import Checkpoints
from k2.training.loop import train
from k2.training.state import TrainState


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
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> TrainState:
    """All steps, from the newest checkpoint if there is one.

    Raises:
        StageError: too many updates in a row were skipped.
    """
    state = TrainState(model, MuonClip(model.named_parameters(), logical_tensors(model.config), config.optimizer))
    if checkpoints is not None:
        checkpoints.restore(state, source)
    schedule = warmup_cosine(config.lr, config.warmup_steps, config.steps, config.final_lr_ratio)
    train(
        state, source, next_token_loss(), lambda _: schedule.lr(state.step + 1),
        until=config.steps, checkpoints=checkpoints, progress=progress,
    )  # fmt: skip
    return state


def accuracy(config: SftConfig, model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Held-out scores of the task mixture: `{"sampled": {...}, "greedy": {...}, "tasks": {...}}`."""
    engine = Engine(model)
    results = {
        mode: evaluate_mixture(
            engine, tokenizer, config.tasks, config.evaluation_items, mode, config.seed, config.evaluation_tokens
        )
        for mode in MODES
    }
    scores: dict[str, Any] = {mode: result.score.json() for mode, result in results.items()}
    return scores | {"tasks": {mode: result.by_task() for mode, result in results.items()}}
