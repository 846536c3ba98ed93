"""Pretraining as a configuration of the training loop: data, phases, the switch to YaRN, and held-out loss.

Letters in shapes: B batch, L length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from k2.config.model import ModelConfig
from k2.config.pretrain import PretrainConfig
from k2.data.loader import TokenLoader
from k2.errors import UserError
from k2.execution.contract import Progress
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.schedule import Phase, Schedule
from k2.training.batches import NextTokenLoss, TokenBatch, micro_batches
from k2.training.checkpoint import Checkpoints
from k2.training.history import History
from k2.training.loop import train
from k2.training.state import TrainState

Tokens = NDArray[np.unsignedinteger[Any]]


def schedule_of(config: PretrainConfig) -> Schedule:
    """Kimi K2's phases (report, section 2.5). Annealing is one line through both contexts."""
    short, long = config.annealing_tokens, config.long_context_tokens
    decayed, final = config.lr * config.decayed_lr_ratio, config.lr * config.final_lr_ratio
    annealed = decayed + (final - decayed) * short / max(1, short + long)
    context = config.context_length
    return Schedule(
        [
            Phase("warmup", config.warmup_tokens, config.lr, "linear", context),
            Phase("stable", config.stable_tokens, config.lr, "constant", context),
            Phase("decay", config.decay_tokens, decayed, "cosine", context),
            Phase("annealing", short, annealed, "linear", context),
            Phase("long_context", long, final, "linear", config.long_context_length, yarn=True),
        ]
    )


@dataclass(frozen=True)
class Segment:
    """Neighbouring phases with one context length: steps up to `until` run on one configuration of the model."""

    name: str
    until: int
    context_length: int
    yarn: bool


def segments(schedule: Schedule, batch_tokens: int) -> list[Segment]:
    """The schedule in steps; a step belongs to the phase its first token falls into."""
    found = []
    for (context, yarn), indices in groupby(range(len(schedule.phases)), key=lambda i: _shape(schedule.phases[i])):
        end = schedule.end(list(indices)[-1])
        name = "long_context" if yarn else "short_context"
        found.append(Segment(name, -(-end // batch_tokens), context, yarn))
    return found


def _shape(phase: Phase) -> tuple[int, bool]:
    return phase.context_length, phase.yarn


def model_config(config: PretrainConfig, yarn: bool) -> ModelConfig:
    """The architecture before the context is extended, or after."""
    if not yarn:
        return config.model
    reach = int(config.yarn.factor * config.yarn.original_max_position_embeddings)
    return config.model.model_copy(update={"rope_scaling": config.yarn, "max_position_embeddings": reach})


def build(config: PretrainConfig) -> TrainState:
    """A freshly initialised model with its optimizer."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    model = Transformer(config.model, compute_dtype=dtype, recompute=config.recompute).initialize(config.seed)
    optimizer = MuonClip(model.named_parameters(), logical_tensors(config.model), config.optimizer)
    return TrainState(model, optimizer, History(interval=-(-config.steps // config.curve_points)))


def reconfigure(model: Transformer, config: ModelConfig) -> Transformer:
    """The same parameters, the very same objects, under another configuration (rotary scaling, context)."""
    with torch.device("meta"):
        again = Transformer(config, compute_dtype=model.compute_dtype, recompute=model.recompute)
    again.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return again


class PackedSource:
    """Steps of packed rows from the token loader."""

    def __init__(self, loader: TokenLoader, config: PretrainConfig) -> None:
        self._loader, self._config = loader, config

    def set_context_length(self, length: int) -> None:
        """Go on with rows of this length and the same tokens per step."""
        self._loader.set_context_length(length, self._config.batch_tokens // length)

    def next_step(self) -> Sequence[TokenBatch]:
        """The next step's rows in micro-batches."""
        batch = self._loader.next_batch()
        rows = self._config.micro_batch_tokens // batch.tokens_BL.shape[1]
        documents = batch.document_BL if self._config.mask_documents else None
        return micro_batches(batch.tokens_BL, batch.targets_BL, rows, documents)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self._loader.load_state_dict(state)


def heldout_batches(tokens: Tokens, length: int, limit: int, rows: int) -> Iterator[TokenBatch]:
    """Rows of `length` in reading order over at most `limit` tokens; a row's first token is only context.

    Raises:
        UserError: the held-out text is shorter than one row.
    """
    count = (min(len(tokens), limit) - 1) // length
    if count < 1:
        raise UserError(f"held-out text has {len(tokens)} tokens; pretrain needs more than context length {length}")
    tokens_BL = tokens[: count * length].astype(np.int64).reshape(count, length)
    targets_BL = tokens[1 : count * length + 1].astype(np.int64).reshape(count, length)
    yield from micro_batches(tokens_BL, targets_BL, rows)


@torch.no_grad()
def heldout_loss(model: Transformer, batches: Iterator[TokenBatch]) -> float:
    """Mean cross-entropy in nats per token."""
    model.eval()
    loss_fn, total, weight = NextTokenLoss(), 0.0, 0.0
    for batch in batches:
        loss = loss_fn(model, batch)
        total, weight = total + loss.total.item(), weight + loss.weight
    return total / weight


def pretrain(
    config: PretrainConfig,
    loader: TokenLoader,
    heldout: Tokens,
    checkpoints: Checkpoints,
    progress: Progress,
) -> TrainState:
    """Run all phases, from the newest checkpoint if there is one.

    `notes["heldout"]` of the state lists the held-out losses: before and after each context length, measured
    with the configuration trained there.
    """
    schedule, state, source = schedule_of(config), build(config), PackedSource(loader, config)
    checkpoints.restore(state, source)
    start = 0
    for segment in segments(schedule, config.batch_tokens):
        if state.step <= segment.until:
            state.model = reconfigure(state.model, model_config(config, segment.yarn))
            source.set_context_length(segment.context_length)
            _measure(state, f"{segment.name}_before", segment, config, heldout, at=start)
            loss_fn = NextTokenLoss(config.balance_loss_weight)
            train(
                state, source, loss_fn, schedule.lr,
                until=segment.until, total=config.steps, checkpoints=checkpoints, progress=progress,
            )  # fmt: skip
            _measure(state, f"{segment.name}_after", segment, config, heldout, at=segment.until)
        start = segment.until
    state.history.finish()
    return state


def _measure(state: TrainState, name: str, segment: Segment, config: PretrainConfig, heldout: Tokens, at: int) -> None:
    """Note the held-out loss at step `at`, unless a checkpoint brought it along."""
    notes = state.notes.setdefault("heldout", [])
    if state.step == at and all(note["name"] != name for note in notes):
        length = segment.context_length
        batches = heldout_batches(heldout, length, config.heldout_tokens, config.micro_batch_tokens // length)
        notes.append({"name": name, "step": at, "context": length, "loss": heldout_loss(state.model, batches)})
