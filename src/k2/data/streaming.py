"""Token shards read from the store while a model trains: only the blocks that a rank's rows touch, each verified.

Blocks stay in memory until there are too many bytes of them; then the shard that was used longest ago goes. A store
that is away is waited for.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from k2.data.packing import Int64
from k2.data.shards import INDEX, Shard, shards_of
from k2.errors import StageError
from k2.store.artifacts import Artifact, CorruptArtifactError
from k2.store.patience import Patience

CONNECTIONS = 8
"""Ranges that are fetched at once: a store answers one in tens of milliseconds."""
RANGE_BLOCKS = 16
"""Neighbouring blocks that one request asks for, at most: 4 MiB."""

Bools = NDArray[np.bool_]


class Files(Protocol):
    """What shards are read from; an artifact's folder is one."""

    def read(self, name: str) -> bytes:
        """A whole small file, verified."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file, not verified."""


class ArtifactFiles:
    """The files of an artifact below a folder. What the store does not give is asked for again for `patience_s`."""

    def __init__(self, artifact: Artifact, folder: str, patience_s: float) -> None:
        self._artifact, self._folder = artifact, folder
        self._patience = Patience(patience_s, "training data")

    def read(self, name: str) -> bytes:
        """A whole small file, verified."""
        return self._patience(lambda: self._artifact.read(f"{self._folder}/{name}"))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file, not verified."""
        return self._patience(lambda: self._artifact.read_range(f"{self._folder}/{name}", start, length))


class HeldShard:
    """A shard of which some blocks are in memory, `held_bytes` of them; the others take none."""

    def __init__(self, shard: Shard, files: Files, dtype: str, block_bytes: int) -> None:
        self.shard, self._files, self._block_bytes = shard, files, block_bytes
        self.offsets: Int64 = _array(files.read(f"{shard.name}.offsets.npy"))
        self._digests: NDArray[np.uint8] = _array(files.read(f"{shard.name}.digests.npy"))
        self._bytes = np.empty(shard.start + shard.tokens * np.dtype(dtype).itemsize, np.uint8)
        self._tokens = self._bytes[shard.start :].view(dtype)
        self._have = np.zeros(len(self._digests), bool)
        self.held_bytes = 0

    def missing(self, places: Int64) -> list[range]:
        """Runs of blocks that have to be fetched for the tokens at these places of the shard."""
        if self.held_bytes == len(self._bytes):
            return []
        wanted = np.zeros(len(self._have), bool)
        wanted[(self.shard.start + places * self._tokens.itemsize) // self._block_bytes] = True
        numbers = np.flatnonzero(wanted & ~self._have)
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        return [
            range(int(run[i]), int(run[i]) + len(run[i : i + RANGE_BLOCKS]))
            for run in runs
            for i in range(0, len(run), RANGE_BLOCKS)
        ]

    def fetch(self, blocks: range) -> int:
        """Bring some neighbouring blocks; returns their bytes.

        Raises:
            CorruptArtifactError: one is not what its digest says.
        """
        name, start = f"{self.shard.name}.npy", blocks.start * self._block_bytes
        length = min(blocks.stop * self._block_bytes, len(self._bytes)) - start
        data = self._files.read_range(name, start, length)
        for block in blocks:
            low = (block - blocks.start) * self._block_bytes
            if hashlib.sha256(data[low : low + self._block_bytes]).digest() != self._digests[block].tobytes():
                raise CorruptArtifactError(f"{name} is corrupt in block {block}; run again and it is made anew")
        self._bytes[start : start + length] = np.frombuffer(data, np.uint8)
        self._have[blocks.start : blocks.stop] = True
        return length

    def tokens(self, places: Int64) -> NDArray[Any]:
        """The tokens at these places; their blocks must be here."""
        return self._tokens[places]

    def is_last(self, places: Int64) -> Bools:
        """Whether a document ends with the token at each place."""
        document = np.searchsorted(self.offsets, places, side="right")
        return np.asarray(places + 1 == self.offsets[document])


class ShardCache:
    """The shards in memory, at most `limit_bytes` of blocks besides those of the shard in use."""

    def __init__(self, files: Files, dtype: str, block_bytes: int, limit_bytes: int) -> None:
        self._files, self._dtype, self._block_bytes, self._limit = files, dtype, block_bytes, limit_bytes
        self._held: dict[str, HeldShard] = {}
        self._pool = ThreadPoolExecutor(CONNECTIONS, "token-blocks")

    def shard(self, shard: Shard) -> HeldShard:
        """A shard, from now on the one used last."""
        held = self._held.pop(shard.name, None) or HeldShard(shard, self._files, self._dtype, self._block_bytes)
        self._held[shard.name] = held
        return held

    def tokens(self, shard: Shard, places: Int64) -> NDArray[Any]:
        """Tokens of a shard, fetched where they are not here."""
        held = self.shard(shard)
        if missing := held.missing(places):
            held.held_bytes += sum(self._pool.map(held.fetch, missing))
            self._forget()
        return held.tokens(places)

    def _forget(self) -> None:
        """Let go of the shards used longest ago, if there are too many bytes."""
        while len(self._held) > 1 and sum(each.held_bytes for each in self._held.values()) > self._limit:
            del self._held[next(iter(self._held))]


class ShardedCorpus:
    """The shards of one domain as a `Corpus`: every shard is a window, tokens are numbered through all of them."""

    def __init__(self, name: str, shards: list[Shard], cache: ShardCache) -> None:
        self.name, self._shards, self._cache = name, shards, cache
        self._bases = np.asarray([0, *accumulate(shard.tokens for shard in shards)])
        self.windows, self.tokens = len(shards), int(self._bases[-1])
        self.documents = sum(shard.documents for shard in shards)

    def offsets(self, window: int) -> Int64:
        """Where the documents of a window start, and where the last one ends."""
        found: Int64 = self._cache.shard(self._shards[window]).offsets + self._bases[window]
        return found

    def read(self, index: Int64) -> NDArray[Any]:
        """The tokens of these numbers."""
        return self._by_window(index, np.int64, self._cache.tokens)

    def is_last(self, index: Int64) -> Bools:
        """Whether a document ends with the token of each number."""
        return self._by_window(index, bool, lambda shard, places: self._cache.shard(shard).is_last(places))

    def _by_window(self, index: Int64, dtype: type, work: Callable[[Shard, Int64], NDArray[Any]]) -> NDArray[Any]:
        """What `work` says of the places in every window that the index touches: of a step's rows, one or two."""
        window = np.searchsorted(self._bases, index, side="right") - 1
        found: NDArray[Any] = np.empty(index.shape, dtype)
        first = window.flat[0] if index.size else 0
        if (window == first).all():
            found[...] = work(self._shards[first], index - self._bases[first])
            return found
        for each in np.unique(window):
            here = window == each
            found[here] = work(self._shards[each], index[here] - self._bases[each])
        return found


def stream(index: Mapping[str, Any], files: Files, limit_bytes: int) -> dict[str, ShardedCorpus]:
    """The corpora of a folder of shards by domain.

    Raises:
        StageError: there is no shard in it.
    """
    domains = shards_of(index)
    if not domains:
        raise StageError(f"{INDEX} lists no shard of tokens; the corpus is empty")
    cache = ShardCache(files, index["dtype"], index["block_bytes"], limit_bytes)
    return {name: ShardedCorpus(name, shards, cache) for name, shards in domains.items()}


def _array(data: bytes) -> NDArray[Any]:
    found: NDArray[Any] = np.load(io.BytesIO(data))
    return found
