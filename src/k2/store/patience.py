"""Waiting for a store that is away for a while."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from k2.store.client import StoreError

FIRST_PAUSE, LONGEST_PAUSE = 1 / 9000, 1 / 90
"""Shares of the time that is waited: of 15 minutes 0.1 s, doubled up to 10 s."""

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


class Patience:
    """Asks a store that is away again, for some seconds. Threads may share it.

    Attributes:
        away: the store does not answer now.

    Args:
        doing: what waits, as a warning calls it.
    """

    def __init__(self, seconds: float, doing: str) -> None:
        self.away = False
        self._seconds, self._doing = seconds, doing
        self._over = threading.Event()

    def end(self) -> None:
        """Let nobody wait any longer."""
        self._over.set()

    def pause(self, seconds: float) -> bool:
        """Let time pass; returns whether anybody still waits."""
        return not self._over.wait(seconds) and threading.main_thread().is_alive()

    def __call__(self, ask: Callable[[], Answer]) -> Answer:
        """What the store answers, after as many attempts as it takes.

        Raises:
            StoreError: it did not in time, or nobody waits any longer.
        """
        started, pause = time.monotonic(), FIRST_PAUSE * self._seconds
        while True:
            try:
                found = ask()
            except StoreError as error:
                waited = time.monotonic() - started
                if not self._seconds:
                    raise
                self._missed(error)
                if waited + pause > self._seconds or not self.pause(pause):
                    self.away = False
                    raise StoreError(f"tried for {waited:.0f} s: {error}") from None
            else:
                self._answered()
                return found
            pause = min(LONGEST_PAUSE * self._seconds, 2 * pause)

    def _missed(self, error: StoreError) -> None:
        if not self.away:
            _log.warning("%s: waiting up to %g s for the store: %s", self._doing, self._seconds, error)
        self.away = True

    def _answered(self) -> None:
        if self.away:
            _log.warning("%s: the store is back", self._doing)
        self.away = False
