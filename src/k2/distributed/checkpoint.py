"""Sharded, asynchronous checkpoints: every rank writes what it owns, any other layout can read it; a process is a rank.

Training stops for one copy of the rank's own weights and optimizer state into memory that is kept (pinned on a GPU); a
thread hashes and uploads it. A rank that has uploaded leaves the index of its objects; when all have, rank 0 writes one
manifest with all of them into the work area, which makes the checkpoint visible. Whoever is killed before that changed
nothing. While a store is away it is asked again, and training goes on without further checkpoints; a rank that cannot
save says so through torchrun's store, which does not need the other.

`torch.distributed.checkpoint` is not used: its collectives would run in that thread, its metadata is a pickle, and what
it could do here, intersecting ranges of rows, is `Index.parts`.
"""

import json
import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from k2.distributed import peers
from k2.distributed.index import Index, Part
from k2.distributed.meeting import connect
from k2.distributed.objects import Objects
from k2.distributed.pieces import Bucket, buckets
from k2.distributed.reshard import read
from k2.distributed.retention import Retention, listed, name_of
from k2.distributed.state import LiveState, Owner, refuse_other_model
from k2.errors import StageError
from k2.store.client import Store, StoreError
from k2.store.patience import Patience
from k2.store.work import WorkArea
from k2.training.state import Source, TrainState

BUCKET_BYTES = 64 << 20
"""Bytes of one object, at most: enough to keep a connection busy, little enough to read again when resharding."""
CONNECTIONS = 4
"""Objects that one rank sends or receives at once."""
PATIENCE_S = 900.0
"""How long a store may be away before a checkpoint is given up."""
LOOK_S = 1.0
"""Seconds after which ranks that wait for their uploads compare notes."""

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves to and restores from a stage's work area, every `interval` steps. All ranks call the same methods.

    A context: leaving it, what was begun last is committed, or finished as far as this rank can when something failed.

    Args:
        work: of the stage, on rank 0; elsewhere None, and the store is the one that the environment names.
        owner: what this rank owns; None where one process owns everything.
        keep: checkpoints kept besides those that somebody reads.
        patience_s: how long a store may be away before a checkpoint is given up.
    """

    def __init__(
        self,
        work: WorkArea | None,
        interval: int,
        owner: Owner | None = None,
        keep: int = 2,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._work, self._interval, self._owner = work, interval, owner
        self._retention = Retention(work, Objects(work.store, work.base), keep) if work else None
        # From here on objects may be written: the retention has deleted what is left of others.
        base, self._attempt = peers.from_first((work.base if work else "", uuid.uuid4().hex[:8]))
        self._patience = Patience(patience_s, "checkpoints")
        self._objects = Objects(work.store if work else Store.from_environment(), base, self._patience)
        self._uploads = ThreadPoolExecutor(CONNECTIONS, "checkpoint-upload")
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: list[Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._patience.end()
            self._background.shutdown()
            self._uploads.shutdown()

    def step(self, state: TrainState, source: Source[Any]) -> bool:
        """Begin to save if the interval says so; returns whether it did.

        While the save before waits for a store that is away it does not; a save that was given up costs its checkpoint.
        """
        due = state.step % self._interval == 0 and self._free()
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
            raise StageError(f"the checkpoint was not saved: {problem}; {peers.from_first(self._kept())}") from error

    def restore(self, state: TrainState, source: Source[Any]) -> bool:
        """Bring state and source to the newest intact checkpoint, whatever layout wrote it; False when there is none.

        Raises:
            UserError: it is of another model.
            StageError: every checkpoint is corrupt, or the store is away, which is no reason to take an older one.
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
            work = self._work
            data = self._patience(lambda: work.load(name)) if work else None
        except StoreError:
            raise
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
        except StoreError:
            raise
        except StageError as error:
            problem = str(error)
        problem = peers.first_problem(problem)
        if problem is None:
            live.written()
            state.set_values(manifest["values"])
            source.load_state_dict(manifest["source"])
        return problem

    def _free(self) -> bool:
        """Wait until all ranks have saved what was begun last; False as soon as one waits for a store that is away."""
        while True:
            notes = peers.from_all((self._pending is None or self._pending.done(), self._patience.away))
            if all(done for done, _ in notes):
                return True
            if any(away for _, away in notes):
                return False
            wait([self._pending] if self._pending else [], LOOK_S)

    def _begin(self, state: TrainState, source: Source[Any]) -> None:
        """Copy what this rank owns, and let the rest happen in the background."""
        if self._pending and (error := self._pending.exception()) is not None:
            if not isinstance(error, StoreError):
                raise error
            _log.warning("a checkpoint was not saved, training goes on: %s; %s", error, self._kept())
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

    def _kept(self) -> str:
        """What there is instead of a checkpoint that was not saved, as far as this rank knows."""
        if self._work is None:
            return "the last one is kept"
        names = listed(self._work)
        return f"{self._work.store.url(self._work.base)} keeps {names[-1] if names else 'none'}"

    def _upload(self, packed: list[Bucket], name: str, manifest: str) -> None:
        """Send this rank's objects; rank 0 waits for the others and commits."""
        try:
            index = self._send(packed)
            if self._retention is None:
                part = f"{self._parts(name)}{peers.rank()}"
                self._patience(lambda: self._objects.store.put(part, json.dumps(index.document()).encode()))
        except Exception as error:
            if peers.rank() > 0:
                connect().set(self._parts(name), f"rank {peers.rank()}: {error}")
            raise
        if self._retention is not None:
            merged = Index.merged([index.document(), *self._others(name)])
            self._commit(self._retention, name, json.loads(manifest), merged)

    def _commit(self, retention: Retention, name: str, manifest: dict[str, Any], index: Index) -> None:
        self._patience(lambda: retention.commit(name, manifest, index))
        self._background.submit(retention.clean)

    def _send(self, packed: list[Bucket]) -> Index:
        views = [buffer.numpy().data for buffer in self._buffers]
        index = Index()
        for bucket, digest in zip(packed, self._uploads.map(self._objects.put, views), strict=True):
            for piece, offset in zip(bucket.pieces, bucket.offsets, strict=True):
                dtype = str(piece.tensor.dtype).removeprefix("torch.")
                index.add(piece.key, dtype, piece.shape, Part(piece.start, piece.stop, digest, offset))
        return index

    def _others(self, name: str) -> Iterator[dict[str, Any]]:
        """The indexes of all other ranks, as they come in.

        Raises:
            StoreError: a rank could not upload; it says why.
        """
        missing, pause = set(range(1, peers.size())), 0.01
        troubles = connect() if missing else None
        while missing and troubles:
            if troubles.check([self._parts(name)]):
                raise StoreError(f"{name}, {troubles.get(self._parts(name)).decode()}")
            for part, document in self._patience(lambda: self._arrived(name)).items():
                self._patience(partial(self._objects.store.delete, part))
                missing.discard(int(part.rpartition("/")[2]))
                yield document
            if not self._patience.pause(pause):
                raise StageError(f"{name}: ranks {sorted(missing)[:8]} have not uploaded")
            pause = min(LOOK_S, 1.5 * pause)

    def _arrived(self, name: str) -> dict[str, dict[str, Any]]:
        """The indexes that other ranks left and nobody has taken yet, by the names of their objects."""
        store = self._objects.store
        return {info.name: json.loads(store.get(info.name) or b"") for info in store.list(self._parts(name))}

    def _parts(self, name: str) -> str:
        return f"{self._objects.base}/parts/{self._attempt}/{name}/"
