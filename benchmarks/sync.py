"""Weight synchronisation against a memory copy of the same bytes.

The first rows are the form in which training and inference share a process, as in `k2 run`: straight into
another model's weights, in CPU time. The last is two processes over gloo, in wall time; a copy in memory is no peer of
theirs, so that it has no target.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


def two_processes(config: ModelConfig, rounds: int) -> Row:
    """The same, of two ranks of which the first one trains."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--rank"]
    environment = os.environ | {"CONFIG": config.model_dump_json(), "ROUNDS": str(rounds)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout.splitlines()[-1])
    return row("weight sync, reference shape, 2 processes, gloo", "memory copy", values, None)


def one_of_two() -> None:
    """What each of the two processes does."""
    dist.init_process_group("gloo")
    config, rounds = ModelConfig.model_validate_json(os.environ["CONFIG"]), int(os.environ["ROUNDS"])
    model = Transformer(config)
    sync = WeightSync(weights(model) if dist.get_rank() == 0 else [], weights(model) if dist.get_rank() == 1 else [])
    flat = torch.ones(sync.bytes, dtype=torch.uint8)
    into = torch.ones_like(flat)
    sync.send(1)
    clock = time.perf_counter
    found = [seconds(lambda: into.copy_(flat), clock) / seconds(lambda: sync.send(2), clock) for _ in range(rounds)]
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def rows(rounds: int) -> Iterator[Row]:
    """One row per shape, and one for two processes."""
    shapes = {name: ModelConfig(**shape["model"]) for name, shape in yaml.safe_load(SHAPES.read_text()).items()}
    for name, config in shapes.items():
        found, size = ratios(config, rounds)
        # A few MB lie in a cache, where a copy takes as long as finding the tensors does.
        yield row(f"weight sync, {name} shape, {size / 1e6:.0f} MB", "memory copy", found, 0.7 if size > 10e6 else None)
    yield two_processes(shapes["reference"], rounds)


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        one_of_two()
    else:
        run(__doc__, rows, 15)
