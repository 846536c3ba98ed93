"""The held-out split: by content, before anything else sees a document, with nothing of it left in training."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator

_SPAN = 13


def content_digest(text: str) -> bytes:
    """SHA-256 of a text without regard to case and whitespace: equal digests are exact duplicates."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()


def score(digest: bytes, seed: int) -> int:
    """A number in [0, 2^64) that decides the split; it depends on the content and the seed alone."""
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "big") + digest).digest()[:8], "big")


class HeldoutGuard:
    """Finds text that repeats held-out text: half of the 13-word spans of the shorter of the two are shared.

    MinHash compares whole documents; this also finds a short held-out document inside a long one.
    """

    def __init__(self, heldout: Iterable[str]) -> None:
        self._owners: dict[str, list[int]] = {}
        self._sizes: list[int] = []
        for index, text in enumerate(heldout):
            spans = set(_spans(text))
            self._sizes.append(len(spans))
            for span in spans:
                self._owners.setdefault(span, []).append(index)

    def repeats(self, text: str) -> bool:
        """Whether the text repeats a held-out document."""
        spans = set(_spans(text))
        shared = Counter(owner for span in spans for owner in self._owners.get(span, ()))
        return any(count >= math.ceil(min(len(spans), self._sizes[owner]) / 2) for owner, count in shared.items())


def _spans(text: str) -> Iterator[str]:
    words = text.casefold().split()
    for start in range(max(len(words) - _SPAN, 0) + 1):
        yield " ".join(words[start : start + _SPAN])
