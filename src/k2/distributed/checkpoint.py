"""Sharded, asynchronous checkpoints: every rank writes what it owns, any other layout can read it; a process is a rank.

Training stops for one copy of the rank's own weights and optimizer state into memory that is kept (pinned on a GPU); a
thread hashes and uploads it. A rank that has uploaded leaves the index of its objects; when all have, rank 0 writes one
manifest with all of them into the work area, which makes the checkpoint visible. Whoever is killed before that changed
nothing. `torch.distributed.checkpoint` is not used: its collectives would run in that thread, its metadata is a pickle,
and what it could do here, intersecting ranges of rows, is `Index.parts`.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from k2.distributed import peers
from k2.distributed.index import Index, Part
from k2.distributed.objects import Objects
from k2.distributed.pieces import Bucket, buckets
from k2.distributed.reshard import read
from k2.distributed.retention import Retention, listed, name_of
from k2.distributed.state import LiveState, Owner, refuse_other_model
from k2.errors import StageError
from k2.store.client import Store, StoreError
from k2.store.work import WorkArea
from k2.training.state import Source, TrainState

BUCKET_BYTES = 64 << 20
"""Bytes of one object, at most: enough to keep a connection busy, little enough to read again when resharding."""
CONNECTIONS = 4
"""Objects that one rank sends or receives at once."""
PATIENCE_S = 900.0
"""How long rank 0 waits for the others' uploads before it gives a checkpoint up."""

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves to and restores from a stage's work area, every `interval` steps. All ranks call the same methods.

    A context: leaving it, what was begun last is committed, or finished as far as this rank can when something failed.

    Args:
        work: of the stage, on rank 0; elsewhere None, and the store is the one that the environment names.
        owner: what this rank owns; None where one process owns everything.
        keep: checkpoints kept besides those that somebody reads.
    """

    def __init__(self, work: WorkArea | None, interval: int, owner: Owner | None = None, keep: int = 2) -> None:
        self._work, self._interval, self._owner = work, interval, owner
        self._retention = Retention(work, Objects(work.store, work.base), keep) if work else None
        # From here on objects may be written: the retention has deleted what is left of others.
        base, self._attempt = peers.from_first((work.base if work else "", uuid.uuid4().hex[:8]))
        self._objects = Objects(work.store if work else Store.from_environment(), base)
        self._uploads = ThreadPoolExecutor(CONNECTIONS, "checkpoint-upload")
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: list[Tensor] = []
        self._left = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._left.set()
            self._background.shutdown()
            self._uploads.shutdown()

    def step(self, state: TrainState, source: Source[Any]) -> bool:
        """Begin to save if the interval says so; returns whether it did. A store that is away costs one checkpoint."""
        due = state.step % self._interval == 0
        if due:
            self._begin(state, source)
        return due

    def save(self, state: TrainState, source: Source[Any]) -> None:
        """Save, and return when it is committed.

        Raises:
            StageError: it could not be, on some rank; the one before is still there.
        """
        self._begin(state, source)
        self.wait()

    def wait(self) -> None:
        """Return when what was begun last is committed.

        Raises:
            StageError: it could not be, on some rank.
        """
        pending, self._pending = self._pending, None
        error = pending.exception() if pending else None
        problem = peers.first_problem(None if error is None else str(error))
        if problem is not None:
            raise StageError(f"the checkpoint was not saved: {problem}") from error

    def restore(self, state: TrainState, source: Source[Any]) -> bool:
        """Bring state and source to the newest intact checkpoint, whatever layout wrote it; False when there is none.

        Raises:
            UserError: it is of another model.
            StageError: every checkpoint is corrupt.
        """
        names = peers.from_first(listed(self._work) if self._work else [])
        for name in reversed(names):
            problem = self._read(name, state, source)
            if problem is None:
                break
            if name == names[0]:
                raise StageError(problem)
            _log.warning("%s cannot be read, taking the one before: %s", name, problem)
        return bool(names)

    def _read(self, name: str, state: TrainState, source: Source[Any]) -> str | None:
        """Take over one checkpoint; returns what was wrong with it on any rank."""
        data = problem = None
        try:
            data = self._work.load(name) if self._work else None
        except StageError as error:
            problem = str(error)
        data, problem = peers.from_first((data, problem))
        if data is None:
            return problem
        manifest = json.loads(data)
        refuse_other_model(manifest["model"], state)
        live = LiveState(state, self._owner, peers.rank() % manifest["ranks"])
        try:
            read(self._objects, Index.merged([manifest["index"]]), live.pieces, CONNECTIONS)
        except StageError as error:
            problem = str(error)
        problem = peers.first_problem(problem)
        if problem is None:
            live.written()
            state.set_values(manifest["values"])
            source.load_state_dict(manifest["source"])
        return problem

    def _begin(self, state: TrainState, source: Source[Any]) -> None:
        """Copy what this rank owns, and let the rest happen in the background."""
        if self._pending and (error := self._pending.exception()) is not None:
            if not isinstance(error, StoreError):
                raise error
            _log.warning("a checkpoint was not saved, training goes on: %s", error)
        packed = buckets(LiveState(state, self._owner, peers.rank()).pieces, BUCKET_BYTES)
        self._snapshot(packed)
        manifest = {
            "model": state.model.config.model_dump(mode="json"),
            "ranks": peers.size(),
            "source": source.state_dict(),
            "values": state.values(),
        }
        # As text: training goes on to change the lists in there.
        self._pending = self._background.submit(self._upload, packed, name_of(state.step), json.dumps(manifest))

    def _snapshot(self, packed: list[Bucket]) -> None:
        if [len(buffer) for buffer in self._buffers] != [bucket.size for bucket in packed]:
            pinned = torch.cuda.is_available()
            self._buffers = [torch.empty(b.size, dtype=torch.uint8, pin_memory=pinned) for b in packed]
        for bucket, buffer in zip(packed, self._buffers, strict=True):
            bucket.pack(buffer)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def _upload(self, packed: list[Bucket], name: str, manifest: str) -> None:
        """Send this rank's objects; rank 0 waits for the others and commits."""
        try:
            index = self._send(packed)
        except StageError as error:
            self._report(name, {"error": str(error)})
            raise
        if self._retention is None:
            self._report(name, index.document())
            return
        merged = Index.merged([index.document(), *self._others(name)])
        self._retention.commit(name, json.loads(manifest), merged)
        self._background.submit(self._retention.clean)

    def _send(self, packed: list[Bucket]) -> Index:
        views = [buffer.numpy().data for buffer in self._buffers]
        index = Index()
        for bucket, digest in zip(packed, self._uploads.map(self._objects.put, views), strict=True):
            for piece, offset in zip(bucket.pieces, bucket.offsets, strict=True):
                dtype = str(piece.tensor.dtype).removeprefix("torch.")
                index.add(piece.key, dtype, piece.shape, Part(piece.start, piece.stop, digest, offset))
        return index

    def _report(self, name: str, document: dict[str, Any]) -> None:
        """Tell rank 0, through the store, what this rank wrote or why it could not."""
        if peers.rank() > 0:
            self._objects.store.put(f"{self._parts(name)}{peers.rank()}", json.dumps(document).encode())

    def _others(self, name: str) -> Iterator[dict[str, Any]]:
        """The indexes of all other ranks, as they come in.

        Raises:
            StageError: a rank could not upload, or did not in time.
        """
        store, missing = self._objects.store, set(range(1, peers.size()))
        end, pause = time.monotonic() + PATIENCE_S, 0.01
        while missing:
            if time.monotonic() > end or self._left.wait(pause) or not threading.main_thread().is_alive():
                raise StageError(f"{name}: ranks {sorted(missing)[:8]} have not uploaded")
            pause = min(1.0, 1.5 * pause)
            for info in list(store.list(self._parts(name))):
                document = json.loads(store.get(info.name) or b"{}")
                if "error" in document:
                    raise StoreError(f"{name}, rank {info.name.rpartition('/')[2]}: {document['error']}")
                store.delete(info.name)
                missing.discard(int(info.name.rpartition("/")[2]))
                yield document

    def _parts(self, name: str) -> str:
        return f"{self._objects.base}/parts/{self._attempt}/{name}/"
