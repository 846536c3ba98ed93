"""Processes of a local run end with the run, even when it is killed by -9; and which of several ranks this one is."""

import ctypes
import os
import signal
import sys
import threading
import time

ROOT_VARIABLE = "K2_DIE_WITH"
"""Process id of a local `k2 run`, set for its processes; unset in a cluster, where the kubelet owns the process."""
PR_SET_PDEATHSIG = 1


def rank() -> int:
    """This process's number among those that torchrun started for one stage; the first one leads and publishes."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started for one stage; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_with_parent() -> None:
    """On Linux the kernel kills this process when the thread that started it ends; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_run() -> None:
    """Kill this process when its parent dies, or within a second after the run that it belongs to is gone.

    What it forks ends with it: libraries do, and their processes would wait for a killed parent forever.
    """
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        return
    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)

    def watch() -> None:
        while exists(int(root)):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    if not exists(int(root)):
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, daemon=True, name="end-with-run").start()


def exists(pid: int) -> bool:
    """Whether a process with this id is there, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
