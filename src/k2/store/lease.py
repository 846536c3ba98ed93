"""A lease on one piece of work: one holder at a time, and a fencing token that only grows.

The lease is an object changed with conditional writes. A holder that dies is replaced when its lease expires,
or at once when it ran on this host and its process is gone.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from k2.errors import StageError
from k2.processes import exists
from k2.store.client import ConflictError, Store, StoreError

log = logging.getLogger(__name__)

LEASE_S = 30.0
"""Seconds a lease lasts without renewal."""


class LeaseLostError(StageError):
    """Someone else took the lease: whatever this process still does must not become visible."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, until when (Unix seconds), with which fencing token, and the URIs it reads meanwhile."""

    token: int
    owner: str
    host: str
    pid: int
    expires: float
    reads: Sequence[str] = ()

    def alive(self) -> bool:
        """Whether the holder may still be working."""
        if self.expires < time.time():
            return False
        return self.host != socket.gethostname() or exists(self.pid)


def parse_holder(body: bytes) -> Holder:
    """The holder that a lease object names."""
    return Holder(**json.loads(body))


class Lease:
    """Context manager that acquires the lease `name`, renews it in a thread, and gives it back."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        waiting: Callable[[Holder], bool] | None = None,
        reads: Sequence[str] = (),
    ) -> None:
        """`waiting` is called each second while another holder is alive; returning True gives up waiting.

        `reads` are URIs of artifacts that garbage collection keeps as long as the lease is held.
        """
        self._store, self._name, self._waiting, self._reads = store, name, waiting, sorted(reads)
        self._owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._etag: str | None = None
        self.token = 0

    @property
    def held(self) -> bool:
        """Whether this process holds the lease."""
        return self._etag is not None

    def assert_held(self) -> None:
        """Renew at once, so that what follows is published by the holder.

        Raises:
            LeaseLostError: another process holds it now.
        """
        self._renew()

    def remove(self) -> None:
        """Delete the held lease itself. Whoever wants it next makes it anew; whoever had it long ago finds it lost."""
        with self._lock:
            self._store.delete(self._name)
            self._etag = None

    def __enter__(self) -> Self:
        while not self._try_acquire():
            time.sleep(1.0)
            holder = self._read()[0]
            if holder and self._waiting and holder.alive() and self._waiting(holder):
                return self
        threading.Thread(target=self._renew_forever, daemon=True, name="lease").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        with self._lock:
            if self._etag is None:
                return
            try:
                self._write(self._holder(expires=0.0), self._etag)
            except (ConflictError, StoreError) as failure:
                log.warning("lease %s was not given back: %s", self._name, failure)
            self._etag = None

    def _holder(self, expires: float) -> Holder:
        return Holder(self.token, self._owner, socket.gethostname(), os.getpid(), expires, self._reads)

    def _read(self) -> tuple[Holder | None, str | None]:
        found = self._store.get_tagged(self._name)
        return (None, None) if found is None else (parse_holder(found[0]), found[1])

    def _write(self, holder: Holder, etag: str | None) -> str:
        known = asdict(holder)
        if not holder.reads:
            # Programs before garbage collection know no such field.
            del known["reads"]
        body = json.dumps(known).encode()
        return self._store.put(self._name, body, if_none_match=etag is None, if_match=etag)

    def _try_acquire(self) -> bool:
        holder, etag = self._read()
        if holder is not None and holder.alive():
            return False
        self.token = 1 if holder is None else holder.token + 1
        try:
            self._etag = self._write(self._holder(time.time() + LEASE_S), etag)
        except ConflictError:
            # A retried request whose first answer was lost has won after all.
            holder, etag = self._read()
            self._etag = etag if holder is not None and holder.owner == self._owner else None
        return self._etag is not None

    def _renew(self) -> None:
        with self._lock:
            if self._etag is None:
                raise LeaseLostError(f"{self._name}: another process took over this work")
            try:
                self._etag = self._write(self._holder(time.time() + LEASE_S), self._etag)
            except ConflictError:
                holder, etag = self._read()
                self._etag = etag if holder is not None and holder.owner == self._owner else None
                if self._etag is None:
                    raise LeaseLostError(f"{self._name}: another process took over this work") from None

    def _renew_forever(self) -> None:
        while not self._stop.wait(LEASE_S / 3):
            try:
                self._renew()
            except StoreError as error:
                log.warning("lease %s not renewed yet: %s", self._name, error)
            except LeaseLostError:
                return


@contextmanager
def exclusive(store: Store, name: str, doing: str) -> Iterator[Lease]:
    """A lease for work that only one process does at a time, and that nobody waits for.

    Raises:
        StageError: another process holds it, and is `doing` what this one was about to.
    """
    holders: list[Holder] = []

    def elsewhere(holder: Holder) -> bool:
        holders.append(holder)
        return True

    with Lease(store, name, waiting=elsewhere) as lease:
        if not lease.held:
            raise StageError(f"{holders[0].host}:{holders[0].pid} is {doing}; run again when that is done")
        yield lease


@contextmanager
def reading(store: Store, *uris: str) -> Iterator[None]:
    """Keep artifacts from garbage collection while they are read outside a run."""
    name = f"readers/{uuid.uuid4().hex}.json"
    with Lease(store, name, reads=uris):
        yield
    store.delete(name)
