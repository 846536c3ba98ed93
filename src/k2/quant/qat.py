"""Quantisation-aware training by self-distillation: the INT4 model learns to say what the unquantised one says.

Kimi K2 Thinking applies QAT to the MoE weights after post-training and publishes no more than that. Distillation
keeps what reinforcement learning taught: demonstrations alone would pull the policy back towards them.

Letters in shapes: N predicted tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from k2.config.quantize import QuantizeConfig
from k2.data.loader import IGNORE
from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import evaluate_mixture
from k2.evaluation.tasks import Example
from k2.execution.contract import Progress
from k2.model.generate import Engine
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.schedule import warmup_cosine
from k2.quant.checkpoint import as_exported
from k2.quant.fake_quant import fake_quantize
from k2.rl.demonstrations import DemonstrationSource, encode_solution
from k2.serving.chat_template import EncodedChat
from k2.training.batches import TokenBatch
from k2.training.loop import Loss, train
from k2.training.state import Saver, TrainState


class Distillation:
    """Loss function: KL(teacher || student) in nats, summed over the tokens that the assistant says."""

    def __init__(self, teacher: Transformer, temperature: float = 1.0) -> None:
        """`teacher` must not change; both distributions are softened by `temperature`."""
        self._teacher, self._temperature = teacher.requires_grad_(False), temperature

    def __call__(self, model: Transformer, batch: TokenBatch) -> Loss:
        """The summed loss of one micro-batch; `agreement` counts tokens on which both models' first choices agree."""
        counted_BL = batch.targets_BL != IGNORE
        with torch.no_grad():
            taught_BLD, _ = self._teacher(batch.tokens_BL, documents_BL=batch.documents_BL)
            taught_NV = self._log_probs(self._teacher, taught_BLD[counted_BL])
        hidden_BLD, statistics = model(batch.tokens_BL, documents_BL=batch.documents_BL)
        student_NV = self._log_probs(model, hidden_BLD[counted_BL])
        divergence = F.kl_div(student_NV, taught_NV, reduction="sum", log_target=True)
        agreement = (student_NV.argmax(-1) == taught_NV.argmax(-1)).sum().item()
        return Loss(divergence, len(student_NV), statistics, {"agreement": agreement})

    def _log_probs(self, model: Transformer, hidden_ND: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(model.logits(hidden_ND).float() / self._temperature, dim=-1)


@torch.no_grad()
def mean_loss(loss_fn: Distillation, model: Transformer, batches: Iterable[TokenBatch]) -> float:
    """The loss per token over batches, without training."""
    losses = [loss_fn(model, batch) for batch in batches]
    return sum(loss.total.item() for loss in losses) / sum(loss.weight for loss in losses)


class QuantizationAwareTraining:
    """One run of it: the unquantised teacher, the data, and the measurements before and after."""

    def __init__(
        self, config: QuantizeConfig, teacher: Transformer, tokenizer: Tokenizer, dialogs: Sequence[EncodedChat]
    ) -> None:
        """`dialogs` are trained on; held-out ones come from the evaluation side of the same tasks.

        Raises:
            UserError: no dialog fits into a row.
        """
        self._config, self._teacher, self._tokenizer = config, teacher, tokenizer
        self._loss = Distillation(teacher, config.temperature)
        self._source = self._packed(dialogs)

    def run(self, student: Transformer, checkpoints: Saver, progress: Progress) -> TrainState:
        """Train `student`, which starts as a copy of the teacher, from the newest checkpoint if there is one.

        `notes` of the returned state hold the measurements: `bf16`, `int4_ptq` (rounded, not trained) and `int4`.

        Raises:
            StageError: too many updates in a row were skipped.
        """
        config = self._config
        student.set_weight_transform(fake_quantize(config.group_size))
        optimizer = MuonClip(student.named_parameters(), logical_tensors(student.config), config.optimizer)
        state = TrainState(student, optimizer)
        checkpoints.restore(state, self._source)
        if "bf16" not in state.notes:
            state.notes["bf16"] = self._measure(self._teacher, None)
            state.notes["int4_ptq"] = self._measure(student, config.group_size)
        row_tokens = config.batch_size * config.context_length
        if config.steps:
            schedule = warmup_cosine(
                config.lr, config.warmup_steps * row_tokens, config.steps * row_tokens, config.final_lr_ratio
            )
            train(
                state, self._source, self._loss, schedule.lr,
                until=config.steps, progress=progress, checkpoints=checkpoints,
            )  # fmt: skip
        state.history.finish()
        state.notes["int4"] = self._measure(student, config.group_size)
        return state

    def _measure(self, model: Transformer, group_size: int | None) -> dict[str, Any]:
        """Greedy accuracy and divergence from the teacher on held-out problems, with the weights of an export."""
        config = self._config
        exported = as_exported(model, group_size)
        result = evaluate_mixture(
            Engine(exported), self._tokenizer, config.tasks, config.evaluation_items, "greedy", config.seed,
            config.evaluation_tokens,
        )  # fmt: skip
        return {"accuracy": result.score.json(), "loss": self._heldout_loss(exported, result.examples)}

    def _heldout_loss(self, model: Transformer, examples: Sequence[Example]) -> float:
        dialogs = [encode_solution(self._tokenizer, example) for example in examples]
        source = self._packed(dialogs)
        tokens = self._config.batch_size * self._config.context_length
        steps = max(1, sum(len(dialog.ids) for dialog in source.dialogs) // tokens)
        return mean_loss(self._loss, model, (batch for _ in range(steps) for batch in source.next_step()))

    def _packed(self, dialogs: Sequence[EncodedChat]) -> DemonstrationSource:
        config, pad = self._config, self._tokenizer.special["[PAD]"]
        return DemonstrationSource(
            dialogs, config.batch_size, config.context_length, config.micro_batch_size, pad, config.seed
        )
