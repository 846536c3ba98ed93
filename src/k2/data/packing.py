"""Packing: a corpus as one token array, and an epoch of it as a stream of segments cut into rows.

Documents are concatenated and split, so no position is padding and none is lost. A row may start in the
middle of a document, and one that crosses a boundary numbers its documents, so that attention can be masked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64 = NDArray[np.int64]


def concatenate(documents: Iterable[ArrayLike], vocab_size: int) -> tuple[NDArray[np.unsignedinteger], Int64]:
    """Token array (uint16, or uint32 above 65,536 entries) and the n+1 offsets at which documents start and end."""
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    arrays = [np.asarray(document, dtype=dtype) for document in documents]
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]), offsets


@dataclass(frozen=True)
class Stream:
    """A sequence of corpus slices, read as if they stood one after the other.

    `starts[i]` is where slice i begins in the token array, `ends[i]` where it ends in the stream.
    """

    starts: Int64
    ends: Int64

    @classmethod
    def of(cls, starts: Int64, lengths: Int64) -> "Stream":
        """The stream of the given slices, empty ones left out."""
        kept = lengths > 0
        return cls(starts[kept], np.cumsum(lengths[kept]))

    @cached_property
    def _shift(self) -> Int64:
        """What is added to a position in the stream, in each slice, to get the index in the token array."""
        shift: Int64 = self.starts - np.concatenate([[0], self.ends[:-1]])
        return shift

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, positions: Int64) -> Int64:
        """Index in the token array of each stream position, any shape."""
        located: Int64 = positions + self._shift[np.searchsorted(self.ends, positions, side="right")]
        return located

    def slices(self, begins: Int64, length: int) -> "Stream":
        """The stream of the pieces [begin, begin + length), in the given order, cut off at the end."""
        stops = np.minimum(begins + length, len(self))
        firsts = np.searchsorted(self.ends, begins, side="right")
        counts = np.searchsorted(self.ends, stops, side="left") - firsts + 1
        piece = np.repeat(np.arange(len(begins)), counts)
        segment = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts) + firsts[piece]
        low = np.maximum(begins[piece], np.concatenate([[0], self.ends])[segment])
        high = np.minimum(stops[piece], self.ends[segment])
        return Stream.of(self.locate(low), high - low)

    def then(self, other: "Stream") -> "Stream":
        """This stream followed by another."""
        return Stream(np.concatenate([self.starts, other.starts]), np.concatenate([self.ends, len(self) + other.ends]))
