"""What the ranks of the synchronisation tests run: `torchrun syncing.py FOLDER pp.ep.dp[:HOSTS] ...`.

Every layout trains two steps, sends its weights, trains two more and sends again, to inference ranks that hold a whole
model in bfloat16 and, beside it, their half of rows of one matrix and of columns of another. The third transfer is
damaged. Rank r leaves `<task>.<r>.pt` with the error, what is in use then, and what should be. HOSTS pretends that
ranks are on other hosts: `aab` that the last of three is.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2.distributed import straight, sync
from k2.distributed.broadcast import Slot
from k2.distributed.pieces import WEIGHT, Piece, pieces_of, weights
from k2.distributed.shared import host_of
from k2.distributed.straight import checksum
from k2.distributed.sync import WeightSync
from k2.errors import StageError
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.planner.layout import Layout
from tests.distributed.program import CONFIG, LENGTH, MICRO_ROWS
from tests.distributed.saving import started, steps

ROWS, COLUMNS = "model.layers.1.self_attn.q_b_proj.weight", "model.layers.2.self_attn.o_proj.weight"


def halves(shapes: dict[str, tuple[int, ...]]) -> list[Piece]:
    """What this rank of a tensor-parallel engine has of two matrices."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    (rows, width), (height, columns) = shapes[ROWS], shapes[COLUMNS]
    part, lower = columns // ranks, rows // ranks * rank
    right = slice(rank * part, (rank + 1) * part)
    return [
        Piece(f"{WEIGHT}/{ROWS}", torch.zeros(rows // ranks, width, dtype=torch.bfloat16), (rows, width), lower),
        Piece(f"{WEIGHT}/{COLUMNS}", torch.zeros(height, part, dtype=torch.bfloat16), (height, columns), 0, right),
    ]


def run(name: str) -> dict[str, Any]:
    pp, ep, dp = (int(number) for number in name.split("."))
    state, source, plan = started(Layout(pp, ep, dp, micro_batch_tokens=MICRO_ROWS * LENGTH))
    assert plan is not None
    tensors = logical_tensors(CONFIG)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    parameters, layout = plan.owned
    biases = [tensor for tensor in tensors if tensor.group == "none"]
    own = pieces_of(parameters, layout, shapes, WEIGHT) + pieces_of(state.model.state_dict(), biases, shapes, WEIGHT)
    models, parts = [Transformer(CONFIG).bfloat16() for _ in range(2)], [halves(shapes), halves(shapes)]
    targets = [weights(model) + part for model, part in zip(models, parts, strict=True)]
    syncing = WeightSync(own, *targets, dtype=torch.bfloat16, limit=5000)
    for version, until in ((1, 2), (2, 4)):
        steps(state, source, plan, until)
        syncing.send(version)
    expected = dict(plan.weights())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Slot, "seal", damaged)
            patch.setattr(straight, "checksum", torn)
            syncing.send(3)
    except StageError as error:
        message = str(error)
    return {
        "version": syncing.version,
        "bytes": syncing.bytes,
        "weights": models[syncing.side].state_dict(),
        "parts": [part.tensor for part in parts[syncing.side]],
        "expected": expected,
        "error": message,
    }


def damaged(slot: Slot, version: int, seal: Callable[[Slot, int], None] = Slot.seal) -> None:
    """What happens on rank 1 to what is broadcast."""
    seal(slot, version)
    slot.memory[77] ^= dist.get_rank()


def torn(words: list[torch.Tensor], version: int) -> int:
    """What happens on rank 1 to what it wrote."""
    found = checksum(words, version)
    words[0][0] ^= dist.get_rank()
    return found


def pretended(hosts: str, device: torch.device) -> str:
    """The host that this rank says it is on."""
    return hosts[dist.get_rank()]


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    for task in names:
        name, _, hosts = task.partition(":")
        sync.host_of = partial(pretended, hosts) if hosts else host_of
        torch.save(run(name), folder / f"{task}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
