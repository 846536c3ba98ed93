"""What a job runs on each of its nodes: torchrun, and an exit code that says whose fault it was.

python -m k2.launch.node --nodes 2 --node 0 --host-in K2_RANK0_HOST --port 29500 --processes 8 -- MODULE ARGUMENTS
"""

import argparse
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from k2.distributed.watchdog import HUNG

USER_ERROR = 2

RESTARTS = 3
"""Times that ranks which hung are started again in the same pod."""


def main(arguments: Sequence[str]) -> int:
    """Run a module in `--processes` processes here, together with those of the other nodes. 2: the user's error.

    Ranks that hung are started again at once, in a pod that has its node, image and caches already. torchrun's own
    `--max-restarts` would repeat user errors too. Of several nodes each counts for itself, and one that came back as a
    new pod would not meet the others; there the pods end, and the job starts all again.
    """
    parser = argparse.ArgumentParser()
    for name in ("--nodes", "--node", "--port", "--processes"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--host-in", required=True, help="variable with the address of node 0")
    parser.add_argument("module", nargs="+")
    found = parser.parse_args(arguments)
    code = _attempt(found)
    for restart in range(1, RESTARTS + 1 if found.nodes == 1 else 1):
        if code != HUNG:
            break
        print(f"the ranks hung: restart {restart} of {RESTARTS}", file=sys.stderr, flush=True)
        code = _attempt(found)
    return code if code in (0, USER_ERROR) else 1


def _attempt(found: argparse.Namespace) -> int:
    """The exit code of the first rank that failed, or 0."""
    try:
        torchrun([*rendezvous(found), f"--nproc-per-node={found.processes}", "-m", *found.module])
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    return 0


def rendezvous(found: argparse.Namespace) -> list[str]:
    """Where the nodes meet. Ranks are numbered by node, so the first node has rank 0."""
    if found.nodes == 1:
        return ["--standalone", "--nnodes=1"]
    host = os.environ.get(found.host_in) or "localhost"
    address = [f"--master-addr={host}", f"--master-port={found.port}"]
    return [f"--nnodes={found.nodes}", f"--node-rank={found.node}", "--rdzv-backend=static", *address]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
