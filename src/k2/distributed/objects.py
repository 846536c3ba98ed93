"""Content-addressed objects of many writers below one base, and marks that keep what is being read. Torch-free.

<base>/objects/<SHA-256>          the bytes; written any number of times, always the same
<base>/readers/<name>/<reader>    a lease: somebody reads the checkpoint `name`
"""

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from k2.errors import StageError
from k2.store.client import Store
from k2.store.lease import Holder, Lease
from k2.store.patience import Patience


class Objects:
    """The objects below `base`; who reads and writes them has `patience` with a store that is away, by default none."""

    def __init__(self, store: Store, base: str, patience: Patience | None = None) -> None:
        self.store, self.base = store, base
        self.patience = patience or Patience(0.0, "objects")

    def put(self, data: bytes | memoryview) -> str:
        """Write an object; returns the digest that is its name."""
        digest = hashlib.sha256(data).hexdigest()
        self.patience(lambda: self.store.put(self._name(digest), cast(bytes, data)))  # any bytes-like will do
        return digest

    def get(self, digest: str) -> bytes:
        """The verified bytes of an object.

        Raises:
            StageError: they are missing or corrupt.
        """
        data = self.patience(lambda: self.store.get(self._name(digest)))
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise StageError(f"{self.store.url(self._name(digest))} is {'missing' if data is None else 'corrupt'}")
        return data

    def digests(self) -> list[str]:
        """Names of all objects, sorted."""
        return [info.name.rpartition("/")[2] for info in self.store.list(f"{self.base}/objects/")]

    def delete(self, digest: str) -> None:
        """Remove an object."""
        self.store.delete(self._name(digest))

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Keep the objects of a checkpoint while this process reads them.

        What was listed after this was entered stays complete: writers look for marks after they have unlisted
        a checkpoint and before they delete its objects.
        """
        mark = f"{self.base}/readers/{name}/{uuid.uuid4().hex}"
        try:
            with Lease(self.store, mark):
                yield
        finally:
            self.store.delete(mark)

    def being_read(self) -> set[str]:
        """Names of checkpoints that somebody who is alive reads."""
        found = set()
        for info in self.store.list(f"{self.base}/readers/"):
            mark = self.store.get(info.name)
            if mark is not None and Holder(**json.loads(mark)).alive():
                found.add(info.name.split("/")[-2])
        return found

    def _name(self, digest: str) -> str:
        return f"{self.base}/objects/{digest}"
