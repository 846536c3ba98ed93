"""Which checkpoints a stage has, and how old ones go without taking anything from who reads them. Torch-free."""

import json
import logging
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

_log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-\d{9}")


def name_of(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"checkpoint-{step:09d}"


def listed(work: WorkArea) -> list[str]:
    """Names of the complete checkpoints, oldest first."""
    return [name for name in work.names() if _NAME.fullmatch(name)]


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
                yield manifest, Index.merged([manifest["index"]]), objects
                return
    raise StageError(f"{store.url(objects.base)} has no checkpoint")


def _look(store: Store, key: str) -> WorkArea:
    """A work area to look into; the lease is not taken."""
    return WorkArea(store, key, Lease(store, f"work/{key}/lease.json"))


class Retention:
    """Keeps the newest checkpoints, and older ones as long as they are read. Only the holder of `work` has one."""

    def __init__(self, work: WorkArea, objects: Objects, keep: int) -> None:
        """What killed saves left behind goes, if nobody reads anything."""
        self._work, self._objects, self._keep = work, objects, keep
        self._references = {name: self._referenced(name) for name in listed(work)}
        self._retired: dict[str, set[str]] = {}
        if not objects.being_read():
            self._delete(set(objects.digests()) - set[str]().union(*self._references.values()))

    def commit(self, name: str, manifest: dict[str, Any], index: Index) -> None:
        """Make a checkpoint visible, and unlist those that are too old.

        Raises:
            LeaseLostError: another process took over this work; nothing became visible.
        """
        old = [other for other in listed(self._work) if other != name]
        old = old[: max(0, len(old) + 1 - self._keep)]
        document = json.dumps(manifest | {"index": index.document()}, sort_keys=True)
        self._work.save({name: document.encode()}, drop=old)
        self._references[name] = index.digests()
        self._retired |= {gone: self._references.pop(gone) for gone in old}

    def clean(self) -> None:
        """Delete the objects that only unlisted checkpoints have which nobody reads."""
        living = self._objects.being_read()
        done = [gone for gone in self._retired if gone not in living]
        garbage = set[str]().union(*(self._retired.pop(gone) for gone in done))
        self._delete(garbage - set[str]().union(*self._references.values(), *self._retired.values()))

    def _delete(self, digests: set[str]) -> None:
        for digest in sorted(digests):
            self._objects.delete(digest)

    def _referenced(self, name: str) -> set[str]:
        """Objects of a listed checkpoint; of one that cannot be read nothing is worth keeping."""
        try:
            return set(json.loads(self._work.load(name) or b"")["index"]["objects"])
        except StageError as error:
            _log.warning("%s cannot be read: %s", name, error)
            return set()
