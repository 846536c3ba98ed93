"""A dry run: one rank of thousands builds its part of a model, is sharded, and exchanges a step, without memory.

Tensors are fake and so is the process group; shapes, shards and buckets are those of the real thing, and so is the
code. Tokens travel to their experts once, as real tensors of one micro-batch whose tokens choose experts evenly; each
layer with experts does the same for every micro-batch. What neighbours in the pipeline send is a formula.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k2.config.model import ModelConfig
from k2.config.pretrain import PretrainConfig
from k2.distributed.expert import ExpertParallel
from k2.distributed.mesh import Mesh, divide
from k2.distributed.plan import DistributedPlan
from k2.errors import UserError
from k2.model.moe import Experts, Routing
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.planner.layout import Layout

BF16 = 2


@dataclass
class Exchange:
    """One kind of collective in a step of one rank: how often, and bytes of its largest tensors in all."""

    count: int = 0
    bytes: int = 0

    def add(self, count: int, size: float) -> None:
        """Note `count` of them with `size` bytes each."""
        self.count, self.bytes = self.count + count, self.bytes + int(count * size)


@dataclass(frozen=True)
class DryRun:
    """What one rank of a layout holds and exchanges.

    parameters, owned: values that it computes with, and those that its optimizer updates.
    collectives: by kind.
    """

    layout: Layout
    rank: int
    parameters: int
    owned: int
    collectives: dict[str, Exchange]

    def text(self) -> str:
        """In lines."""
        lines = [f"rank {self.rank} holds {self.parameters:,} values and updates {self.owned:,}; in one step it makes"]
        lines += [
            f"  {name:<20}{each.count:>9,} x, {each.bytes / 1e9:10.3f} GB" for name, each in self.collectives.items()
        ]
        return "\n".join(lines)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every collective that is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, Exchange] = defaultdict(Exchange)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_").replace("_base", "")
            self.found[name].add(1, max(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)))
            if name == "alltoall":  # the other ranks send what this one does: their tokens choose as evenly
                args[0].copy_(args[1])
        return func(*args, **(kwargs or {}))


def dry_run(config: PretrainConfig, layout: Layout, rank: int) -> DryRun:
    """Build one rank's part of a run and count a step.

    Raises:
        UserError: the layout does not divide, or there is no such rank.
    """
    reason = layout.problem(config.model, config.batch_tokens, config.context_length)
    if reason or not 0 <= rank < layout.ranks:
        raise UserError(f"layout: {reason}" if reason else f"rank {rank}: the layout has {layout.ranks}")
    with _fake_ranks(layout, rank) as mesh:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = Transformer(config.model, compute_dtype=torch.bfloat16)
            if config.param_dtype == "bfloat16":
                model.narrow()
            plan = DistributedPlan(mesh, model)
            optimizer = plan.optimizer(config.optimizer)
            with _Counter() as counter:
                _exchange(plan, optimizer, config.model)
                plan.max_(torch.zeros(mesh.world_size + 1, dtype=torch.float64))  # `plan.after`, which reads values
        held = sum(parameter.numel() for parameter in model.parameters())
        owned = sum(parameter.numel() for parameter in optimizer.trained())
        _add_forward_and_backward(counter.found, config, mesh, model)
    return DryRun(layout, rank, held, owned, dict(sorted(counter.found.items())))


def _exchange(plan: DistributedPlan, optimizer: MuonClip, model: ModelConfig) -> None:
    """What `train_step` shares after the last micro-batch: sums, maxima, gradients, their norm, weights, the RMS."""
    plan.sum_([torch.zeros(3, dtype=torch.float64), torch.zeros(model.mixture_layers, model.n_routed_experts)])
    plan.max_(optimizer.qk_clip.maxima)
    plan.reduce_gradients()
    plan.sum_([torch.zeros((), dtype=torch.float64)])
    plan.share_weights()
    plan.sum_([torch.zeros(2, dtype=torch.float64)])


def _dispatched(config: PretrainConfig, mesh: Mesh) -> dict[str, Exchange]:
    """What one layer's dispatcher exchanges for one micro-batch, forward and backward; its experts do nothing."""
    model, tokens = config.model, mesh.layout.micro_batch_tokens
    chosen = model.num_experts_per_tok
    x_TD = torch.zeros(tokens, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weights_TS = torch.ones(tokens, chosen, requires_grad=True)
    experts_TS = torch.arange(tokens * chosen).remainder(model.n_routed_experts).view(tokens, chosen)
    routing = Routing(experts_TS, weights_TS, torch.empty(tokens, model.n_routed_experts, device="meta"))
    with _Counter() as counter:
        output_TD = ExpertParallel(mesh.experts)(x_TD, routing, _Idle())()
        output_TD.backward(torch.zeros_like(output_TD))  # type: ignore[no-untyped-call]
    found: dict[str, Exchange] = counter.found
    return found


class _Idle(Experts):
    """Experts that give every row back, so that only its journey is left."""

    def __init__(self) -> None:
        super().__init__(0, 0, 0)

    def forward(self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, rows: Any = None) -> Tensor:
        """Rows as they came, in the gradient's reach of their weights."""
        return x_TD + weights_TS.to(x_TD.dtype)


def _add_forward_and_backward(
    found: dict[str, Exchange], config: PretrainConfig, mesh: Mesh, model: Transformer
) -> None:
    """What micro-batches exchange: in every layer with experts, and between neighbours in the pipeline."""
    layout = mesh.layout
    micro_batches, tokens = layout.micro_batches(config.batch_tokens), layout.micro_batch_tokens
    layers = sum(int(number) >= config.model.first_k_dense_replace for number in model.layers)
    for name, each in _dispatched(config, mesh).items() if layout.ep > 1 and layers else ():
        times = micro_batches * layers
        found[name].add(times * each.count, each.bytes / each.count)
    chunks = layout.pp * layout.virtual_stages
    # A slice gets something from each neighbour in the pipeline for every micro-batch, and gives something back.
    edges = sum((chunk > 0) + (chunk < chunks - 1) for chunk in range(mesh.pipeline.rank(), chunks, layout.pp))
    if edges:
        found["send"].add(micro_batches * edges, BF16 * tokens * config.model.hidden_size)
        found["recv"].add(micro_batches * edges, BF16 * tokens * config.model.hidden_size)


@contextmanager
def _fake_ranks(layout: Layout, rank: int) -> Iterator[Mesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        yield divide(layout, "cpu")
    finally:
        dist.destroy_process_group()
