"""Pretraining as a configuration of the training loop: data, phases, the switch to YaRN, and held-out loss.

Letters in shapes: B batch, L length.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from k2.config.model import ModelConfig
from k2.config.pretrain import PretrainConfig
from k2.data.ledger import Ledger
from k2.data.loader import IGNORE, Corpus, TokenLoader
from k2.data.mixture import Mixture
from k2.data.prefetch import Loader
from k2.distributed import peers
from k2.distributed.mesh import Mesh, join, problem_of
from k2.distributed.plan import DistributedPlan
from k2.errors import StageError, UserError
from k2.execution.contract import Progress
from k2.model.cost import token_cost
from k2.model.layout import logical_tensors
from k2.model.mla import LatentAttention
from k2.model.rope import softmax_scale
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.optim.schedule import Phase, Schedule
from k2.planner.layout import Layout, default_layout
from k2.processes import world_size
from k2.training.batches import NextTokenLoss, TokenBatch, micro_batches
from k2.training.history import History
from k2.training.loop import ParallelPlan, SingleProcess, train
from k2.training.room import device_room, require_room
from k2.training.state import Saver, TrainState

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


def layout_of(config: PretrainConfig, context: int, ranks: int) -> Layout:
    """How ranks divide the work at a context length; data parallelism takes what pipeline and experts leave."""
    parallel = config.parallel
    group = parallel.pipeline_parallel_size * parallel.expert_parallel_size
    layout = replace(
        default_layout(config),
        pp=parallel.pipeline_parallel_size,
        ep=parallel.expert_parallel_size,
        dp=max(1, ranks // group),
        virtual_stages=parallel.virtual_stages,
    )
    return replace(layout, micro_batch_tokens=micro_batch_rows(config, context, layout) * context)


def micro_batch_rows(config: PretrainConfig, context: int, layout: Layout) -> int:
    """Rows of a micro-batch: at most what the configuration says, and at most a rank's part of a step."""
    return max(1, min(config.micro_batch_tokens, config.batch_tokens // layout.data_parallel) // context)


def join_ranks(config: PretrainConfig, identity: Mapping[str, Any]) -> Mesh | None:
    """Meet the other ranks, or None in a process that is alone.

    Raises:
        UserError: on all ranks alike, when they cannot train this together; on any whose part has no room in memory.
    """
    ranks = world_size()
    contexts = {config.context_length} | ({config.long_context_length} if config.long_context_tokens else set())
    layouts = {context: layout_of(config, context, ranks) for context in sorted(contexts)}
    if ranks == 1 and all(layout.ranks == 1 for layout in layouts.values()):
        _require_room(config, layouts, 0)
        return None
    mine = {"pretrain": config.model_dump(mode="json", exclude={"threads"}), **identity}
    if ranks == 1:
        raise UserError(f"parallel: {_problem(config, layouts, 1)}")
    context = config.context_length
    mesh = join(layouts[context], config.model, batch_tokens=config.batch_tokens, context=context, identity=mine)
    if problem := _problem(config, layouts, ranks):
        raise UserError(f"layout: {problem}")
    _require_room(config, layouts, mesh.pipeline.rank())
    return mesh


def _require_room(config: PretrainConfig, layouts: Mapping[int, Layout], stage: int) -> None:
    device, room = device_room()
    for context, layout in layouts.items():
        require_room(config.model_copy(update={"context_length": context}), layout, stage, device, room)


def _problem(config: PretrainConfig, layouts: Mapping[int, Layout], ranks: int) -> str | None:
    found = (problem_of(each, config.model, config.batch_tokens, length, ranks) for length, each in layouts.items())
    return next(filter(None, found), None)


def build(config: PretrainConfig, mesh: Mesh | None = None) -> tuple[TrainState, ParallelPlan]:
    """A freshly initialised model with its optimizer, or a rank's part of both."""
    history = History(interval=-(-config.steps // config.curve_points))
    with nullcontext() if mesh is None else torch.device("meta"):
        model = Transformer(
            config.model,
            compute_dtype=torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
            recompute=config.recompute,
            fp8_storage=config.fp8_storage,
            offload_activations=config.offload_activations,
        )
        if config.param_dtype == "bfloat16":
            model.narrow()
    if mesh is not None:
        plan = DistributedPlan(mesh, model, config.seed)
        return TrainState(model, plan.optimizer(config.optimizer), history), plan
    optimizer = MuonClip(
        model.initialize(config.seed).named_parameters(), logical_tensors(config.model), config.optimizer
    )
    return TrainState(model, optimizer, history), SingleProcess()


def reconfigure(model: Transformer, config: ModelConfig) -> None:
    """Give a model, or a part of one, another rotary scaling and context."""
    model.config = config
    for attention in (module for module in model.modules() if isinstance(module, LatentAttention)):
        attention.config, attention.scale = config, softmax_scale(config)


def mixture_of(config: PretrainConfig, corpora: Mapping[str, Corpus], plan: ParallelPlan) -> Mixture:
    """This rank's rows of the domains that the configuration weighs.

    Raises:
        UserError: it weighs a domain that the corpus does not have.
    """
    weights = config.data.mixture or {name: float(corpus.tokens) for name, corpus in corpora.items()}
    if unknown := sorted(weights.keys() - corpora.keys()):
        raise UserError(f"pretrain.data.mixture weighs {unknown[0]!r}; the domains here are {', '.join(corpora)}")
    loaders = {name: TokenLoader(corpora[name], 0, config.context_length, config.seed) for name in weights}
    rows = config.batch_tokens // config.context_length
    return Mixture(loaders, weights, rows, plan.data_rank, plan.layout.data_parallel)


class PackedSource:
    """Steps of packed rows from a loader, and the ledger that proves that all ranks together read each row once.

    Its position is taken by all ranks together.
    """

    def __init__(self, loader: Loader, config: PretrainConfig, layout: Layout) -> None:
        self._loader, self._config, self._layout = loader, config, layout
        self._ledger, self._read = Ledger(), Ledger()

    def set_context_length(self, length: int) -> None:
        """Go on with rows of this length and the same tokens per step."""
        self._loader.set_context_length(length, self._config.batch_tokens // length)

    def next_step(self) -> Sequence[TokenBatch]:
        """The next step's rows in micro-batches."""
        batch = self._loader.next_batch()
        self._read.add(self._loader.read)
        rows = micro_batch_rows(self._config, batch.tokens_BL.shape[1], self._layout)
        documents = batch.document_BL if self._config.mask_documents else None
        return micro_batches(batch.tokens_BL, batch.targets_BL, rows, documents)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position, and the ledger of all ranks up to here."""
        return {"loader": self._loader.state_dict(), "ledger": self.ledger().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self._loader.load_state_dict(state["loader"])
        self._ledger, self._read = Ledger.merged([state["ledger"]]), Ledger()

    def ledger(self) -> Ledger:
        """What all ranks read since the run began; all must call it. The stages of a pipeline read the same.

        Raises:
            StageError: rows were read twice or left out.
        """
        found, part = peers.from_all(self._read.state_dict()), self._layout.data_parallel
        if any(found[rank] != found[rank % part] for rank in range(len(found))):
            raise StageError("data: pipeline stages of one replica read different rows")
        self._ledger, self._read = Ledger.merged([self._ledger.state_dict(), *found[:part]]), Ledger()
        self._ledger.check()
        return self._ledger


def heldout_batches(tokens: Tokens, length: int, limit: int, rows: int, plan: ParallelPlan) -> list[TokenBatch]:
    """This rank's rows of `length` of at most `limit` tokens in reading order; a row's first token is only context.

    Several ranks get equally many full micro-batches: blank rows, which have no loss, fill the last ones.

    Raises:
        UserError: the held-out text is shorter than one row.
    """
    count = (min(len(tokens), limit) - 1) // length
    if count < 1:
        raise UserError(f"held-out text has {len(tokens)} tokens; pretrain needs more than context length {length}")
    tokens_BL = tokens[: count * length].astype(np.int64).reshape(count, length)
    targets_BL = tokens[1 : count * length + 1].astype(np.int64).reshape(count, length)
    layout = plan.layout
    if layout.ranks > 1:
        blank = ((0, -count % (layout.data_parallel * layout.pp * rows)), (0, 0))
        tokens_BL, targets_BL = np.pad(tokens_BL, blank), np.pad(targets_BL, blank, constant_values=IGNORE)
    part = len(tokens_BL) // layout.data_parallel
    mine = slice(plan.data_rank * part, (plan.data_rank + 1) * part)
    return micro_batches(tokens_BL[mine], targets_BL[mine], rows)


@torch.no_grad()
def heldout_loss(model: Transformer, batches: Sequence[TokenBatch], plan: ParallelPlan) -> float:
    """Mean cross-entropy in nats per token over all ranks' batches."""
    model.eval()
    losses = [(loss.total.item(), float(loss.weight)) for _, loss in plan.losses(model, batches, NextTokenLoss())]
    sums = torch.tensor(losses, dtype=torch.float64).sum(0)
    plan.sum_([sums])
    total, weight = sums.tolist()
    return float(total / weight)


def pretrain(
    config: PretrainConfig,
    state: TrainState,
    plan: ParallelPlan,
    loader: Loader,
    heldout: Tokens,
    checkpoints: Saver,
    progress: Progress,
) -> None:
    """Run all phases, from the newest checkpoint if there is one.

    `notes["heldout"]` of the state lists the held-out losses: before and after each context length, measured
    with the configuration trained there; `notes["ledger"]` proves in the end that every row was read once.
    """
    schedule, source = schedule_of(config), PackedSource(loader, config, plan.layout)
    checkpoints.restore(state, source)
    start = 0
    for segment in segments(schedule, config.batch_tokens):
        if state.step <= segment.until:
            reconfigure(state.model, model_config(config, segment.yarn))
            source.set_context_length(segment.context_length)
            measure = partial(_measure, state, plan, segment, config, heldout)
            progress.event("phase", name=segment.name, **_work(state.model.config, segment.context_length))
            measure(f"{segment.name}_before", at=start)
            if state.step == start and config.optimizer.spike_policy == "rollback":
                checkpoints.save(state, source)  # a rollback must not lead into another context length
            train(
                state, source, NextTokenLoss(config.balance_loss_weight), schedule.lr, until=segment.until,
                total=config.steps, checkpoints=checkpoints, progress=progress, plan=plan,
            )  # fmt: skip
            measure(f"{segment.name}_after", at=segment.until)
        start = segment.until
    state.history.finish()
    state.notes["ledger"] = source.ledger().state_dict()


def _work(config: ModelConfig, context: int) -> dict[str, int]:
    """What a token costs at this context length, in operations of the forward and the backward pass."""
    return {"context_length": context, "flops_per_token": token_cost(config, context).flops_training}


def _measure(
    state: TrainState, plan: ParallelPlan, segment: Segment, config: PretrainConfig, heldout: Tokens, name: str, at: int
) -> None:
    """Note the held-out loss at step `at`, unless a checkpoint brought it along."""
    notes = state.notes.setdefault("heldout", [])
    if state.step == at and all(note["name"] != name for note in notes):
        length = segment.context_length
        rows = micro_batch_rows(config, length, plan.layout)
        batches = heldout_batches(heldout, length, config.heldout_tokens, rows, plan)
        loss = heldout_loss(state.model, batches, plan)
        notes.append({"name": name, "step": at, "context": length, "loss": loss})
