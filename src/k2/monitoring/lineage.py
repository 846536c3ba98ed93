"""From any artifact back to the documents: the tree of what was made from what."""

from collections.abc import Iterator
from dataclasses import dataclass

from k2.store.artifacts import Artifact, open_uri
from k2.store.client import Store


@dataclass(frozen=True)
class Node:
    """One artifact and, by the name of the input, what it was made from."""

    uri: str
    kind: str
    digest: str
    bytes: int
    inputs: tuple[tuple[str, "Node"], ...] = ()


def lineage(store: Store, uri: str) -> Node:
    """The tree above an artifact. One that several stages used is one shared node.

    Raises:
        StageError: an artifact on the way is gone.
    """
    return _node(open_uri(store, uri), {})


def walk(root: Node) -> Iterator[Node]:
    """Every artifact of a tree once, parents before children."""
    seen: set[str] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop(0)
        if node.uri not in seen:
            seen.add(node.uri)
            yield node
            waiting.extend(child for _, child in node.inputs)


def render_tree(root: Node) -> str:
    """The tree as text, one artifact a line; what was shown before is named and not repeated."""
    return "\n".join(_lines(root, "", "", "", set()))


def as_dict(root: Node) -> dict[str, object]:
    """The tree as JSON: artifacts by URI, with the URIs of their inputs."""
    return {
        node.uri: {
            "kind": node.kind,
            "digest": node.digest,
            "bytes": node.bytes,
            "inputs": {name: child.uri for name, child in node.inputs},
        }
        for node in walk(root)
    }


def _node(artifact: Artifact, known: dict[str, Node]) -> Node:
    if artifact.uri not in known:
        uris = artifact.manifest.provenance.get("inputs", {})
        inputs = tuple((name, _node(open_uri(artifact.store, uri), known)) for name, uri in sorted(uris.items()))
        size = artifact.manifest.size
        known[artifact.uri] = Node(artifact.uri, artifact.kind, artifact.digest, size, inputs)
    return known[artifact.uri]


def _lines(node: Node, label: str, first: str, rest: str, seen: set[str]) -> Iterator[str]:
    repeated = node.uri in seen
    seen.add(node.uri)
    suffix = "  (see above)" if repeated and node.inputs else f"  {node.uri}"
    yield f"{first}{label}{node.kind} {node.digest[:12]}{suffix}"
    if repeated:
        return
    for position, (name, child) in enumerate(node.inputs, start=1):
        last = position == len(node.inputs)
        label = "" if name == child.kind else f"{name}: "
        yield from _lines(child, label, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), seen)
