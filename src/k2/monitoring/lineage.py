"""From any artifact back to the documents: the tree of what was made from what."""

from collections.abc import Iterator
from typing import TypedDict

from k2.store.artifacts import Artifact, open_uri
from k2.store.client import Store


class Node(TypedDict):
    """One artifact and, by the name of the input, what it was made from. JSON-ready."""

    uri: str
    kind: str
    digest: str
    bytes: int
    inputs: dict[str, "Node"]


def lineage(store: Store, uri: str) -> Node:
    """The tree above an artifact. One that several stages used appears under each of them.

    Raises:
        StageError: an artifact on the way is gone.
    """
    return _node(open_uri(store, uri), {})


def walk(root: Node) -> Iterator[Node]:
    """Every artifact of a tree once, nearest first."""
    seen: set[str] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop(0)
        if node["uri"] not in seen:
            seen.add(node["uri"])
            yield node
            waiting.extend(node["inputs"].values())


def render_tree(root: Node) -> str:
    """The tree as text, one artifact a line; what was shown before is named and not opened again."""
    return "\n".join(_lines(root, "", "", "", set()))


def _node(artifact: Artifact, known: dict[str, Node]) -> Node:
    if artifact.uri not in known:
        uris = artifact.manifest.provenance.get("inputs", {})
        known[artifact.uri] = {
            "uri": artifact.uri,
            "kind": artifact.kind,
            "digest": artifact.digest,
            "bytes": artifact.manifest.size,
            "inputs": {name: _node(open_uri(artifact.store, uri), known) for name, uri in sorted(uris.items())},
        }
    return known[artifact.uri]


def _lines(node: Node, label: str, first: str, rest: str, seen: set[str]) -> Iterator[str]:
    repeated = node["uri"] in seen
    seen.add(node["uri"])
    where = "(see above)" if repeated else node["uri"]
    yield f"{first}{label}{node['kind']} {node['digest'][:12]}  {where}"
    if repeated:
        return
    for position, (name, child) in enumerate(node["inputs"].items(), start=1):
        last = position == len(node["inputs"])
        label = "" if name == child["kind"] else f"{name}: "
        yield from _lines(child, label, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), seen)
