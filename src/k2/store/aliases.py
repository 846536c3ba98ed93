"""Aliases: names such as `champion` that move from artifact to artifact by compare-and-swap."""

import json
from dataclasses import dataclass

from k2.store.artifacts import Artifact, open_uri
from k2.store.client import Store


@dataclass(frozen=True)
class Alias:
    """What an alias points at, with the ETag a change must present (None: it does not exist yet)."""

    name: str
    uri: str | None
    etag: str | None

    def artifact(self, store: Store) -> Artifact | None:
        """The artifact it points at."""
        return open_uri(store, self.uri) if self.uri else None


def read_alias(store: Store, name: str) -> Alias:
    """The current state of an alias, also of one that was never set."""
    found = store.get_tagged(f"aliases/{name}.json")
    return Alias(name, None, None) if found is None else Alias(name, json.loads(found[0])["uri"], found[1])


def move_alias(store: Store, alias: Alias, target: Artifact) -> Alias:
    """Point an alias at another artifact, unless it changed since it was read.

    Raises:
        ConflictError: it changed meanwhile.
    """
    body = json.dumps({"uri": target.uri, "digest": target.digest}, sort_keys=True).encode()
    etag = store.put(f"aliases/{alias.name}.json", body, if_none_match=alias.etag is None, if_match=alias.etag)
    return Alias(alias.name, target.uri, etag)
