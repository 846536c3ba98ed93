"""Memory that the processes of a host share: tensors of one that others write into, and a board for what they tell.

None of it has a name that would stay: a storage's file is unlinked as soon as it is made, the board is a memfd, and
others open both through /proc. So nothing remains of whoever is killed, and a pidfd tells the others.
"""

import mmap
import os
import select
import shutil
import sys
import time
import uuid
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from k2.distributed import peers
from k2.errors import StageError

ROOM = Path("/dev/shm")
"""Where the kernel counts shared tensors; a container may have little of it."""
NAP_S, LOOKS = 5e-5, 200
"""Who waits naps between looks, so as not to take a processor from who works, and every `LOOKS` looks makes sure that
the others live."""

Handle = tuple[int, int, int]
"""A shared storage: process, file descriptor there, bytes."""


def host_of(device: torch.device) -> str:
    """Equal for ranks that can share memory of this device: the same machine, the same numbers for processes."""
    if device.type != "cpu" or sys.platform != "linux":
        return uuid.uuid4().hex
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def room() -> int:
    """Bytes that can be shared."""
    return shutil.disk_usage(ROOM).free if ROOM.exists() else 0


def share(storage: torch.UntypedStorage) -> Handle:
    """Move a storage to where others can open it; tensors in it stay what they are."""
    descriptor, size = storage._share_fd_cpu_()
    return os.getpid(), descriptor, size


def opened(handle: Handle) -> Tensor:
    """The bytes of another process's storage."""
    process, descriptor, size = handle
    file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    memory = mmap.mmap(file, size)
    os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Board:
    """Numbers that all ranks of a host see, zero at first; everyone writes its own. All ranks make it together.

    numbers: [size, ranks], int64.
    """

    def __init__(self, size: int) -> None:
        file = os.memfd_create("k2-board")
        os.ftruncate(file, 8 * size * peers.size())
        boards = peers.from_all((os.getpid(), file, 8 * size * peers.size()))
        self.numbers = opened(boards[0]).view(torch.int64).numpy().reshape(size, peers.size())
        peers.from_all(None)  # all have it open
        os.close(file)
        self._lives = select.poll()
        for process, _, _ in boards:
            life = os.pidfd_open(process)
            weakref.finalize(self, os.close, life)
            self._lives.register(life, select.POLLIN)

    def wait(self, ready: Callable[[], bool | np.bool_]) -> None:
        """Wait for what others write.

        Raises:
            StageError: one of them is dead.
        """
        for look in count(1):
            if ready():
                return
            time.sleep(NAP_S)
            if look % LOOKS == 0 and self._lives.poll(0):
                raise StageError("weight synchronisation: a rank of this host was killed")
