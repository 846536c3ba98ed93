"""Processes of a local run end with the process that started them."""

import os
import signal
import threading
import time

PARENT_VARIABLE = "K2_DIE_WITH_PARENT"
"""Set for the processes of a local run; unset in a cluster, where the kubelet owns the process."""


def die_with_parent() -> None:
    """Kill this process soon after its parent is gone, so that nothing outlives a `k2 run` killed by -9."""
    if not os.environ.get(PARENT_VARIABLE):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="die-with-parent").start()
