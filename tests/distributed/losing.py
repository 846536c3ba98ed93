"""What the ranks of the kill tests run: `losing.py VICTIM`, with torchrun's environment.

Rank 0 sends its weights to the others, changes them, and sends again; meanwhile the victim is killed (-9). Who is left
prints the version and whether the weights in use are those of that version.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

from k2.distributed import straight
from k2.distributed.pieces import weights
from k2.distributed.shared import Board
from k2.distributed.straight import Check, Straight
from k2.distributed.sync import WeightSync
from k2.errors import StageError
from k2.model.transformer import Transformer
from tests.distributed.program import CONFIG

write = Straight._write


def killed(way: Straight, board: Board, number: int, *rest: int) -> None:
    """What the victim does in the middle of a transfer."""
    write(way, board, number, *rest)
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_reader(board: Board, check: Check, version: int) -> list[str]:
    """The same of one that only reads."""
    os.kill(os.getpid(), signal.SIGKILL)
    return [f"{board} {check} {version}"]


def main(victim: int) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    trained, used, spare = (Transformer(CONFIG).initialize(seed) for seed in (0, 1, 2))
    if rank == 0:
        sync = WeightSync(weights(trained), [], limit=5000)
    else:
        sync = WeightSync([], weights(used), weights(spare), limit=5000)
    sync.send(1)
    if rank == victim:
        Straight._write, straight._wrong = killed, killed_reader  # type: ignore[method-assign]
    with torch.no_grad():
        trained.embed_tokens.weight += 1
    try:
        sync.send(2)
    except (StageError, RuntimeError):
        sent = Transformer(CONFIG).initialize(0).state_dict()
        same = all(torch.equal(tensor, sent[name]) for name, tensor in used.state_dict().items())
        print(sync.version, sync.side, same, flush=True)
    os._exit(0)  # without saying goodbye to the dead


if __name__ == "__main__":
    main(int(sys.argv[1]))
