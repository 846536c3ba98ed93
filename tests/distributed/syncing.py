"""What the ranks of the synchronisation tests run: `torchrun syncing.py FOLDER pp.ep.dp ...`.

Every layout trains two steps, sends its weights, trains two more and sends again, to inference ranks that hold a whole
model in bfloat16 and, beside it, their half of rows of one matrix and of columns of another. Rank r leaves
`<layout>.<r>.pt` with what arrived and what should have, and the error of a transfer that is damaged on its way.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k2.distributed import peers
from k2.distributed.pieces import WEIGHT, Piece, pieces_of, weights
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
        Piece(f"{WEIGHT}/{ROWS}", torch.zeros(rows // ranks, width), (rows, width), lower),
        Piece(f"{WEIGHT}/{COLUMNS}", torch.zeros(height, part), (height, columns), 0, right),
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
    inference, parts = Transformer(CONFIG), halves(shapes)
    sync = WeightSync(own, weights(inference) + parts, torch.bfloat16, limit=5000)
    for version, until in ((1, 2), (2, 4)):
        steps(state, source, plan, until)
        sync.send(version)
    expected = dict(plan.weights())
    found = {"version": sync.version, "bytes": sync.bytes, "weights": inference.state_dict(), "expected": expected}
    found["parts"] = [part.tensor for part in parts]
    arrive = WeightSync._arrive

    def damaged(self: WeightSync, number: int, *rest: Any) -> str | None:
        rest[0].wait()
        self._memory[number][number % 100] ^= number == 3 and peers.rank() == 1
        return arrive(self, number, *rest)

    WeightSync._arrive = damaged  # type: ignore[method-assign]
    try:
        sync.send(3)
    except StageError as error:
        found |= {"error": str(error), "torn": sync.version}
    WeightSync._arrive = arrive  # type: ignore[method-assign]
    return found


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    for name in names:
        torch.save(run(name), folder / f"{name}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
