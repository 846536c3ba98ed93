"""The ranks of a run, by what they share: rank = (pipeline stage x dp + replica) x ep + expert-parallel index.

As in Kimi K2 (report, section 2.4) a pipeline stage has some of the layers; its ranks read data of their own, divide
the routed experts by `ep` and hold the same everything else. Ranks that exchange tokens are neighbours, so that they
share a node where it fits; the stages of one replica read the same data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from k2.config.model import ModelConfig
from k2.distributed.meeting import meeting_point
from k2.errors import UserError
from k2.planner.layout import Layout, divisors
from k2.processes import rank, world_size


@dataclass(frozen=True)
class Mesh:
    """One rank's place.

    everyone: all ranks.
    pipeline: the ranks that hold all layers together, `pp` of them; they read the same data.
    stage: the ranks of this pipeline stage, which hold the same dense weights, `ep * dp` of them.
    experts: the ranks that hold all routed experts of the stage together, `ep` of them.
    replicas: the ranks that hold the same routed experts, `dp` of them.
    """

    layout: Layout
    rank: int
    world_size: int
    everyone: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    stage: dist.ProcessGroup
    experts: dist.ProcessGroup
    replicas: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which part of every step's rows is this rank's, of `layout.data_parallel` parts."""
        return self.stage.rank()


def join(
    layout: Layout,
    model: ModelConfig,
    *,
    batch_tokens: int,
    context: int,
    identity: Mapping[str, Any],
    backend: str = "gloo",
) -> Mesh:
    """Meet the other ranks (torchrun's environment says where) and agree with them before anything is computed.

    A process group that is already there is used, so that one may be shared.

    Args:
        layout: `pp * ep * dp` is the number of ranks.
        identity: everything that all ranks must have in common, configuration and code: nested, JSON-ready.
        backend: torch.distributed's, such as `gloo`, or `cpu:gloo,cuda:nccl` on GPUs.
    Raises:
        UserError: on every rank alike, when the layout does not divide or the ranks do not agree.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend, store=meeting_point(), rank=rank(), world_size=world_size())
    size = dist.get_world_size()
    # Exchanged before anybody refuses: a rank that left alone would keep the others waiting.
    mine = (problem_of(layout, model, batch_tokens, context, size), dict(_flat(identity)))
    found = [mine] * size
    dist.all_gather_object(found, mine)
    if refused := _refusal(found):
        raise UserError(refused)
    return divide(layout, "cuda" if "nccl" in backend else "cpu")


def divide(layout: Layout, device: str) -> Mesh:
    """This rank's place among the ranks of a process group that is there, of a layout that divides."""
    names = ("pp", "dp", "ep")
    mesh = init_device_mesh(device, (layout.pp, layout.dp, layout.ep), mesh_dim_names=names)
    everyone = dist.group.WORLD
    assert everyone is not None  # torch's type only: the process group was made above
    stage = mesh["dp", "ep"]._flatten("stage")
    groups = mesh.get_group("pp"), stage.get_group(), mesh.get_group("ep"), mesh.get_group("dp")
    return Mesh(layout, everyone.rank(), everyone.size(), everyone, *groups)


def problem_of(layout: Layout, model: ModelConfig, batch_tokens: int, context: int, ranks: int) -> str | None:
    """Why these ranks cannot train by this layout and what they can, or None."""
    if layout.ranks != ranks:
        product = f"pp={layout.pp} x ep={layout.ep} x dp={layout.dp}"
        problem = f"{product} are {layout.ranks} ranks, but {ranks} were started"
    else:
        found = layout.problem(model, batch_tokens, context)
        if found is None:
            return None
        problem = found
    for fewer in range(ranks, 0, -1):
        fitting = [other for other in _others(layout, fewer) if other.problem(model, batch_tokens, context) is None]
        if fitting:
            nearest = min(fitting, key=lambda other: _distance(layout, other))
            return f"{problem}; the nearest that works is {_named(nearest)}{_on(fewer) if fewer < ranks else ''}"
    return f"{problem}; no number of ranks has a layout that works"


def _on(ranks: int) -> str:
    return f" on {ranks} rank{'s' if ranks > 1 else ''}"


def _named(layout: Layout) -> str:
    virtual = f"virtual_stages={layout.virtual_stages}, " if layout.virtual_stages > 1 else ""
    return f"pp={layout.pp}, {virtual}ep={layout.ep}, dp={layout.dp}"


def _others(layout: Layout, ranks: int) -> Iterator[Layout]:
    for pp in divisors(ranks):
        for ep in divisors(ranks // pp):
            for virtual in sorted({1, layout.virtual_stages}) if pp > 1 else (1,):
                yield replace(layout, pp=pp, virtual_stages=virtual, ep=ep, dp=ranks // pp // ep)


def _distance(wanted: Layout, other: Layout) -> tuple[int, ...]:
    stages, virtual = abs(other.pp - wanted.pp), abs(other.virtual_stages - wanted.virtual_stages)
    return stages + abs(other.ep - wanted.ep) + virtual, stages, other.pp, other.ep


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refusal(found: list[tuple[str | None, dict[str, Any]]]) -> str | None:
    """The one line that all ranks say, from every rank's problem and identity."""
    first = found[0][1]
    for number, (_, other) in enumerate(found):
        for name in sorted(first.keys() | other.keys()):
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                return f"ranks disagree on {name}: rank {number} has {_short(theirs)}, rank 0 has {_short(ours)}"
    return next((f"layout: {problem}" for problem, _ in found if problem), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
