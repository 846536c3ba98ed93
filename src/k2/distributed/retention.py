"""Which checkpoints a stage has, and how old ones go without taking anything from who reads them. Torch-free."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from k2.distributed.index import Index
from k2.distributed.objects import Objects
from k2.errors import StageError
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

_NAME = re.compile(r"checkpoint-\d{9}")


def name_of(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"checkpoint-{step:09d}"


def listed(work: WorkArea) -> list[str]:
    """Names of the complete checkpoints, oldest first."""
    return [name for name in work.names() if _NAME.fullmatch(name)]


def load_index(objects: Objects, manifest: dict[str, Any]) -> Index:
    """The index that a manifest names.

    Raises:
        StageError: it is missing or corrupt.
    """
    return Index.merged([json.loads(objects.get(manifest["index"]))])


@contextmanager
def opened(store: Store, key: str) -> Iterator[tuple[dict[str, Any], Index, Objects]]:
    """The newest checkpoint of a stage that somebody else trains; it stays complete while this is open.

    Raises:
        StageError: there is none.
    """
    objects = Objects(store, f"work/{key}")
    for name in reversed(listed(_look(store, key))):
        with objects.reading(name):
            data = _look(store, key).load(name)  # again: it may have gone before it was marked
            if data is not None:
                manifest = json.loads(data)
                yield manifest, load_index(objects, manifest), objects
                return
    raise StageError(f"{store.url(objects.base)} has no checkpoint")


def _look(store: Store, key: str) -> WorkArea:
    """A work area to look into; the lease is not taken."""
    return WorkArea(store, key, Lease(store, f"work/{key}/lease.json"))


class Retention:
    """Keeps the newest checkpoints, and older ones as long as they are read. Only the holder of `work` has one."""

    def __init__(self, work: WorkArea, objects: Objects, keep: int) -> None:
        self._work, self._objects, self._keep = work, objects, keep
        self._references = {name: self._referenced(name) for name in listed(work)}
        self._retired: dict[str, set[str]] = {}

    def commit(self, name: str, manifest: dict[str, Any], index: Index) -> None:
        """Make a checkpoint visible, unlist those that are too old and delete what nobody needs any more.

        Raises:
            LeaseLostError: another process took over this work; nothing became visible.
        """
        old = [other for other in listed(self._work) if other != name]
        old = old[: max(0, len(old) + 1 - self._keep)]
        self._work.save({name: json.dumps(manifest, sort_keys=True).encode()}, drop=old)
        self._references[name] = index.digests() | {manifest["index"]}
        self._retired |= {gone: self._references.pop(gone) for gone in old}
        living = self._objects.being_read()
        done = [gone for gone in self._retired if gone not in living]
        garbage = set[str]().union(*(self._retired.pop(gone) for gone in done))
        self._delete(garbage - set[str]().union(*self._references.values(), *self._retired.values()))

    def sweep(self) -> None:
        """Delete what killed saves left behind, if nobody reads anything."""
        if not self._objects.being_read():
            self._delete(set(self._objects.digests()) - set[str]().union(*self._references.values()))
            for info in self._objects.store.list(f"{self._objects.base}/parts/"):
                self._objects.store.delete(info.name)

    def _delete(self, digests: set[str]) -> None:
        for digest in sorted(digests):
            self._objects.delete(digest)

    def _referenced(self, name: str) -> set[str]:
        data = self._work.load(name)
        if data is None:
            return set()
        manifest = json.loads(data)
        return load_index(self._objects, manifest).digests() | {manifest["index"]}
