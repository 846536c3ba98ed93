"""The ranks of a run, by what they share. Rank = data-parallel index x ep + expert-parallel index.

As in Kimi K2 (report, section 2.4) every rank reads data of its own; the routed experts are divided by `ep`, all other
weights are the same everywhere. Ranks that exchange tokens are neighbours, so that they share a node where it fits.
"""

from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from k2.config.model import ModelConfig
from k2.errors import UserError
from k2.planner.layout import Layout, divisors


@dataclass(frozen=True)
class Mesh:
    """One rank's place.

    everyone: all ranks, which hold the same dense weights.
    experts: the ranks that hold all routed experts together, `ep` of them.
    replicas: the ranks that hold the same routed experts, `dp` of them.
    """

    rank: int
    world_size: int
    everyone: dist.ProcessGroup
    experts: dist.ProcessGroup
    replicas: dist.ProcessGroup


def join(
    layout: Layout, model: ModelConfig, *, batch_tokens: int, context: int, digest: str, backend: str = "gloo"
) -> Mesh:
    """Meet the other ranks (torchrun's environment says where) and agree with them before anything is computed.

    A process group that is already there is used, so that one may be shared.

    Args:
        layout: `pp` is 1; `ep * dp` is the number of ranks.
        digest: of everything that all ranks must have in common, configuration and code.
        backend: torch.distributed's, such as `gloo`, or `cpu:gloo,cuda:nccl` on GPUs.
    Raises:
        UserError: on every rank alike, when the layout does not divide or the ranks do not agree.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend)
    rank, size = dist.get_rank(), dist.get_world_size()
    # Exchanged before anybody refuses: a rank that left alone would keep the others waiting.
    mine = (problem_of(layout, model, batch_tokens, context, size), digest)
    found = [mine] * size
    dist.all_gather_object(found, mine)
    if refused := _refusal(found):
        raise UserError(refused)
    mesh = init_device_mesh("cuda" if "nccl" in backend else "cpu", (layout.dp, layout.ep), mesh_dim_names=("dp", "ep"))
    everyone = dist.group.WORLD
    assert everyone is not None  # torch's type only: the process group was made above
    return Mesh(rank, size, everyone, mesh.get_group("ep"), mesh.get_group("dp"))


def problem_of(layout: Layout, model: ModelConfig, batch_tokens: int, context: int, ranks: int) -> str | None:
    """Why these ranks cannot train by this layout and what they can, or None."""
    if layout.pp * layout.virtual_stages > 1:
        problem = f"pp={layout.pp}, virtual_stages={layout.virtual_stages}: pipeline parallelism is not there"
    elif layout.ranks != ranks:
        problem = f"ep={layout.ep} x dp={layout.dp} are {layout.ranks} ranks, but {ranks} were started"
    else:
        found = layout.problem(model, batch_tokens, context)
        if found is None:
            return None
        problem = found
    others = [replace(layout, pp=1, virtual_stages=1, ep=ep, dp=ranks // ep) for ep in divisors(ranks)]
    fitting = [other for other in others if other.problem(model, batch_tokens, context) is None]
    if not fitting:
        return f"{problem}; {ranks} ranks have no layout that works"
    nearest = min(fitting, key=lambda other: (abs(other.ep - layout.ep), other.ep))
    return f"{problem}; the nearest that works is pp=1, ep={nearest.ep}, dp={nearest.dp}"


def _refusal(found: list[tuple[str | None, str]]) -> str | None:
    """The one line that all ranks say, from every rank's problem and digest."""
    first = found[0][1]
    for rank, (_, digest) in enumerate(found):
        if digest != first:
            return f"rank {rank} has another configuration than rank 0: digest {digest[:12]}, not {first[:12]}"
    return next((f"layout: {problem}" for problem, _ in found if problem), None)
