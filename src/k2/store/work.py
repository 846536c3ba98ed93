"""Work in progress: named objects under `work/<key>/` that survive kill -9, behind a lease.

One index object, changed with If-Match, is the commit point: several objects appear and disappear together, and a
process whose lease was taken over can no longer change anything that is visible.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from k2.errors import StageError
from k2.store.client import ConflictError, Store
from k2.store.lease import Lease, LeaseLostError


class WorkArea:
    """Objects of one key under `base`. Only the holder of `lease` may save."""

    def __init__(self, store: Store, key: str, lease: Lease) -> None:
        self.store, self.base, self.lease = store, f"work/{key}", lease
        found = store.get_tagged(f"{self.base}/index.json")
        self._etag = found[1] if found else None
        self._index: dict[str, dict[str, str]] = json.loads(found[0]) if found else {}

    def names(self) -> list[str]:
        """Sorted names of the saved objects."""
        return sorted(self._index)

    def load(self, name: str) -> bytes | None:
        """The verified bytes saved under a name, or None.

        Raises:
            StageError: the stored bytes are missing or corrupt.
        """
        entry = self._index.get(name)
        if entry is None:
            return None
        data = self.store.get(entry["object"])
        if data is None or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise StageError(
                f"{self.store.url(entry['object'])} is missing or corrupt; remove {self.store.url(self.base)}/"
                " to start this stage afresh"
            )
        return data

    def save(self, objects: Mapping[str, bytes | Path], drop: Iterable[str] = ()) -> None:
        """Commit several objects at once, and forget others, in one atomic step.

        Raises:
            LeaseLostError: another process took over this work; nothing became visible.
        """
        added = {name: self._upload(name, data) for name, data in sorted(objects.items())}
        dropped = [self._index[name]["object"] for name in drop if name in self._index]
        kept = {name: entry for name, entry in self._index.items() if name not in set(drop)}
        self._commit(kept | added)
        for name in dropped:
            self.store.delete(name)

    def clear(self) -> None:
        """Remove everything, after the artifact was published."""
        for info in list(self.store.list(f"{self.base}/")):
            if not info.name.endswith("/lease.json"):
                self.store.delete(info.name)
        self._index, self._etag = {}, None

    def _upload(self, name: str, data: bytes | Path) -> dict[str, str]:
        content = data.read_bytes() if isinstance(data, Path) else data
        digest = hashlib.sha256(content).hexdigest()
        # Named by its content, so that the same save made again commits the same index.
        target = f"{self.base}/{name}.{self.lease.token}-{digest[:16]}"
        self.store.put(target, content)
        return {"object": target, "sha256": digest}

    def _commit(self, index: dict[str, dict[str, str]]) -> None:
        body = json.dumps(index, sort_keys=True).encode()
        name = f"{self.base}/index.json"
        try:
            self._etag = self.store.put(name, body, if_none_match=self._etag is None, if_match=self._etag)
        except ConflictError:
            # A retried request whose first answer was lost meets its own write.
            found = self.store.get_tagged(name)
            if found is None or found[0] != body:
                raise LeaseLostError(f"{self.base}: another process took over this work") from None
            self._etag = found[1]
        self._index = index
