"""Where the ranks of a run meet: torchrun's key-value store, for what is said outside of collectives."""

import os
from datetime import timedelta
from functools import cache

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

PATIENCE = timedelta(days=7)
"""How long a rank waits for word from another: the first one may be waiting for a lease, and dies with all others."""


def connect() -> Store:
    """A connection to the store that the ranks of this attempt share; torchrun's environment says where it is."""
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"k2/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@cache
def meeting_point() -> Store:
    """This process's connection. Whoever waits in it keeps its other users waiting; threads have their own."""
    return connect()


def tell(name: str, word: str) -> None:
    """Say something to all ranks that hear `name`, now or later."""
    meeting_point().set(name, word)


def hear(name: str) -> str:
    """Wait for what is told."""
    meeting_point().wait([name], PATIENCE)
    return str(meeting_point().get(name), "utf-8")
