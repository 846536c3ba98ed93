"""Weight synchronisation against a memory copy of the same bytes, both in turn.

The first rows are the form in which training and inference share a process, as in `k2 run`: straight into another
model's weights, in CPU time. The others are processes of one host, in wall time: all of them copy as many bytes at
once as each one that infers has to write, and the slowest counts. Weights are checked on arrival, the copies are not.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from _table import Row, row, run

from k2.config.model import ModelConfig
from k2.distributed.pieces import weights
from k2.distributed.sync import WeightSync
from k2.model.transformer import Transformer

SHAPES = Path(__file__).with_name("shapes.yaml")
DEEPER = {"num_hidden_layers": 12, "n_routed_experts": 32}
"""What makes a shape larger than the caches of a processor, as the weights of a real model are."""
FORMS = {
    "1 process trains, 1 infers": (1, 2),
    "2 processes train half each and infer": (2, 2),
    "2 processes train half each, 2 infer": (2, 4),
}
"""Processes with weights to send, and processes altogether."""


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Time of one call."""
    start = clock()
    work()
    return clock() - start


def ratios(config: ModelConfig, rounds: int) -> tuple[list[float], int]:
    """Throughput over that of a copy into the same places, both in turn; and the bytes."""
    training, inference = Transformer(config).initialize(0), Transformer(config)
    sync = WeightSync(weights(training), weights(inference))
    flat = torch.empty(sync.bytes, dtype=torch.uint8)
    into = torch.empty_like(flat).fill_(1)

    def transfer() -> None:
        sync.send(1)

    transfer()
    return [seconds(lambda: into.copy_(flat)) / seconds(transfer) for _ in range(rounds)], sync.bytes


def processes(config: ModelConfig, rounds: int, form: str) -> Row:
    """The same between processes, in the wall time of the slowest; of the copies that all of them make at once."""
    trainers, ranks = FORMS[form]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    environment = os.environ | {"CONFIG": config.model_dump_json(), "ROUNDS": str(rounds), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rank", str(trainers)], env=environment, capture_output=True, text=True, check=True
    )
    values, size = json.loads(done.stdout.splitlines()[-1])
    return row(f"weight sync, {form}, {size / 1e6:.0f} MB", f"memory copies in {ranks} processes", values, 0.7)


def one_of_many(trainers: int) -> None:
    """What each process does: the first ones have some layers' weights, the last ones want them all."""
    dist.init_process_group("gloo")
    config, rounds = ModelConfig.model_validate_json(os.environ["CONFIG"]), int(os.environ["ROUNDS"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pieces = weights(Transformer(config).initialize(0))
    sync = WeightSync(
        pieces[len(pieces) * rank // trainers : len(pieces) * (rank + 1) // trainers] if rank < trainers else [],
        weights(Transformer(config)) if rank >= trainers or trainers == ranks else [],
    )
    flat = torch.ones(sync.bytes, dtype=torch.uint8)
    into = torch.ones_like(flat)

    def together(work: Callable[[], object]) -> float:
        dist.barrier()
        own = torch.tensor(seconds(work, time.perf_counter))
        dist.all_reduce(own, dist.ReduceOp.MAX)
        return own.item()

    sync.send(0)
    found = [together(lambda: into.copy_(flat)) / together(partial(sync.send, number)) for number in range(rounds)]
    if rank == 0:
        print(json.dumps([found, sync.bytes]))
    dist.destroy_process_group()


def rows(rounds: int) -> Iterator[Row]:
    """One row per shape, and one for two processes."""
    models = {name: shape["model"] for name, shape in yaml.safe_load(SHAPES.read_text()).items()}
    models["deeper reference"] = models["reference"] | DEEPER
    shapes = {name: ModelConfig(**model) for name, model in models.items()}
    for name, config in shapes.items():
        found, size = ratios(config, rounds)
        # A few MB lie in a cache, where a copy takes as long as finding the tensors does.
        yield row(f"weight sync, {name} shape, {size / 1e6:.0f} MB", "memory copy", found, 0.7 if size > 10e6 else None)
    for form in FORMS:
        yield processes(shapes["deeper reference"], rounds, form)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        one_of_many(int(sys.argv[2]))
    else:
        run(__doc__, rows, 15)
