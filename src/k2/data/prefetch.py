"""Batches made ahead: a thread reads and packs the next steps' rows while the model computes.

Several are made in a row, because the first one after a step costs twice as much: the model has emptied the caches.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

from k2.data.ledger import Span
from k2.data.loader import Batch


class Loader(Protocol):
    """Steps of rows with a resumable position: one corpus, a mixture of some, or either made ahead."""

    @property
    def read(self) -> Sequence[Span]:
        """The rows of the last batch."""

    def next_batch(self) -> Batch:
        """The rank's rows of the next step."""

    def set_context_length(self, context_length: int, batch_size: int) -> None:
        """Go on with rows of another length."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, JSON-ready."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""


_Made = tuple[Batch, Sequence[Span], dict[str, Any]]


class Prefetch:
    """A loader whose next `ahead` batches are made in a thread, as soon as half of them are gone.

    Its position is that of the last batch taken.
    """

    def __init__(self, loader: Loader, ahead: int) -> None:
        self._loader, self._count = loader, ahead
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._ahead: deque[Future[_Made]] = deque()
        self._state = loader.state_dict()
        self.read: Sequence[Span] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def next_batch(self) -> Batch:
        """The rank's rows of the next step."""
        if len(self._ahead) <= (self._count + 1) // 2:
            missing = self._count + 1 - len(self._ahead)
            self._ahead += [self._thread.submit(self._make) for _ in range(missing)]
        batch, self.read, self._state = self._ahead.popleft().result()
        return batch

    def set_context_length(self, context_length: int, batch_size: int) -> None:
        """Go on with rows of another length."""
        self.load_state_dict(self._state)
        self._loader.set_context_length(context_length, batch_size)
        self._state = self._loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch taken."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; what was made ahead is forgotten."""
        while self._ahead:
            future = self._ahead.popleft()
            if not future.cancel():
                future.exception()  # waits until the thread has left the loader
        self._loader.load_state_dict(state)
        self._state = state

    def _make(self) -> _Made:
        return self._loader.next_batch(), self._loader.read, self._loader.state_dict()
