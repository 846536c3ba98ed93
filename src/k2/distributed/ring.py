"""Where buckets travel: a ring of slots that the ranks of a host share, and broadcasts between hosts.

A bucket lies in one slot on every host. Its owner packs it there, elsewhere one rank receives it by broadcast, and all
ranks of a host take what they want from the slot. Slots are memory without a name (memfd), so that nothing remains
of whoever is killed, and small enough to stay in the cache between packing and taking. Ranks tell how far they are by
counters beside the slots, and notice the death of another by its pidfd. Memory of a GPU is not shared: there every rank
is a host of its own.
"""

import mmap
import os
import select
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from k2.distributed import peers
from k2.errors import StageError

SLOTS = 4
"""Buckets under way at once."""
LINE = 64
"""Bytes between counters, so that no two share a line of the cache."""
SEGMENT = 8192
"""Words of 8 bytes that a checksum adds up at a time; a bucket's memory is a multiple of them."""
SPINS, NAP_S, LOOKS = 200, 5e-5, 1000
"""Who waits looks so often, then naps between looks, and every `LOOKS` looks makes sure that the others live."""


def host_of(device: torch.device) -> str:
    """Equal for ranks that can share memory: the same machine, the same numbers for processes."""
    if device.type != "cpu" or sys.platform != "linux":
        return uuid.uuid4().hex
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


class Slot:
    """Memory of one bucket under way, and behind it a checksum that the version is part of."""

    def __init__(self, memory: Tensor, size: int) -> None:
        self.memory = memory[: padded(size)]
        words = self.memory.view(torch.int64)
        self._segments, self._checksum = words[:-1].view(-1, SEGMENT), words[-1:]
        self._places = torch.arange(1, 2 * len(self._segments), 2, device=memory.device)

    def seal(self, version: int) -> None:
        """Note the checksum of what is there."""
        torch.add(self._sum(), version, out=self._checksum)

    def sound(self, version: int) -> bool:
        """Whether it is what was sealed."""
        return torch.equal(self._sum() + version, self._checksum)

    def _sum(self) -> Tensor:
        """Of the segments' words, weighted by place, modulo 2^64."""
        return (self._segments.sum(1) * self._places).sum(0, keepdim=True)


def padded(size: int) -> int:
    """Bytes under way of a bucket of `size` bytes."""
    return (-(-size // (8 * SEGMENT)) * SEGMENT + 1) * 8


class Ring:
    """The slots of this host. All ranks make it together, and pass every bucket through it in the same order.

    Args:
        hosts: of all ranks, as `host_of` has them.
        size: bytes of the largest bucket.
    """

    def __init__(self, hosts: Sequence[str], size: int, device: torch.device) -> None:
        self._hosts = [[rank for rank, other in enumerate(hosts) if other == host] for host in hosts]
        self._local = self._hosts[peers.rank()]
        self._groups = self._rails() if len(set(hosts)) > 1 else {}
        counters, size = (SLOTS + 3 * len(self._local)) * LINE, -(-padded(size) // LINE) * LINE * SLOTS
        memory = self._shared(counters + (size if device.type == "cpu" else 0))
        words = np.frombuffer(memory, np.int64, counters // 8)[:: LINE // 8]
        self._filled, self._taken, *self._spoiled = np.split(words, SLOTS + len(self._local) * np.arange(3))
        self._place, self._base = self._local.index(peers.rank()), 0
        own = torch.frombuffer(memory, dtype=torch.uint8, offset=counters) if device.type == "cpu" else None
        self._slots = (torch.zeros(size, dtype=torch.uint8, device=device) if own is None else own).view(SLOTS, -1)

    def slot(self, number: int, size: int) -> Slot:
        """Where a bucket lies; buckets are numbered from 0 in every round."""
        return Slot(self._slots[number % SLOTS], size)

    def writes(self, owner: int) -> bool:
        """Whether it is this rank that fills the host's slot with an owner's bucket."""
        return self._writer(owner, peers.rank()) == peers.rank()

    def wait_free(self, number: int) -> None:
        """Wait until all ranks of the host have taken what was in a bucket's slot."""
        self._wait(lambda: int(self._taken.min()) > self._base + number - SLOTS)

    def broadcast(self, owner: int, memory: Tensor) -> dist.Work | None:
        """Send a bucket to the other hosts, or receive it; None when there are no others. For who writes it only."""
        if not self._groups:
            return None
        work: dist.Work = dist.broadcast(memory, owner, self._groups[self._rail(owner)], async_op=True)
        return work

    def fill(self, number: int) -> None:
        """Let the host's ranks take a bucket."""
        self._filled[number % SLOTS] = self._base + number + 1

    def wait_filled(self, number: int) -> None:
        """Wait until a bucket may be taken."""
        self._wait(lambda: int(self._filled[number % SLOTS]) > self._base + number)

    def take(self, number: int) -> None:
        """Say that this rank has what it wants of a bucket and of all before it."""
        self._taken[self._place] = self._base + number + 1

    def end(self, count: int, spoiled: bool) -> bool:
        """End a round of so many buckets; returns whether one was spoiled for any rank."""
        self._spoiled[0][self._place] = spoiled
        self._base += -(-count // SLOTS) * SLOTS
        self.take(-1)
        self._wait(lambda: int(self._taken.min()) >= self._base)
        anywhere = torch.tensor(bool(self._spoiled[0].any()))
        self._spoiled.reverse()  # who is fast must not overwrite what others still read
        if self._groups:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    def _writer(self, owner: int, rank: int) -> int:
        there, own = self._hosts[rank], self._hosts[owner]
        return owner if there == own else there[own.index(owner) % len(there)]

    def _rail(self, owner: int) -> tuple[int, ...]:
        """The ranks that handle an owner's buckets, one a host."""
        return tuple(sorted({self._writer(owner, rank) for rank in range(len(self._hosts))}))

    def _rails(self) -> dict[tuple[int, ...], dist.ProcessGroup | None]:
        rails = dict.fromkeys(self._rail(owner) for owner in range(len(self._hosts)))
        return {rail: dist.new_group(list(rail)) for rail in rails}

    def _shared(self, size: int) -> mmap.mmap:
        """Memory that the host's ranks share, zeros at first."""
        first = self._local[0] == peers.rank()
        descriptor = os.memfd_create("k2-sync") if first else -1
        if first:
            os.posix_fallocate(descriptor, 0, size)
        others = peers.from_all((os.getpid(), descriptor))
        if not first:
            process, theirs = others[self._local[0]]
            descriptor = os.open(f"/proc/{process}/fd/{theirs}", os.O_RDWR)
        memory = mmap.mmap(descriptor, size)
        peers.from_all(None)  # all have it open
        os.close(descriptor)
        self._lives = select.poll()
        for rank in self._local:
            life = os.pidfd_open(others[rank][0])
            weakref.finalize(self, os.close, life)
            self._lives.register(life, select.POLLIN)
        return memory

    def _wait(self, ready: Callable[[], bool]) -> None:
        """
        Raises:
            StageError: a rank of this host is dead.
        """
        for look in count(1):
            if ready():
                return
            os.sched_yield() if look < SPINS else time.sleep(NAP_S)
            if look % LOOKS == 0 and self._lives.poll(0):
                raise StageError("weight synchronisation: a rank of this host was killed")
