"""A pod's log, followed by asking again: no connection has to last as long as the work."""

import sys
from collections.abc import Iterable, Mapping

from k2.errors import StageError
from k2.launch.cluster import PODS, Cluster, ClusterError, Object
from k2.masking import masked
from k2.store.client import Store

CHUNK_BYTES = 2**20
"""Size of one object of a log in the store, which cannot append."""

INDEX = "batch.kubernetes.io/job-completion-index"
TAIL = 20
"""Lines kept for an error."""


def pod_of_node(cluster: Cluster, labels: Mapping[str, str], node: int = 0) -> Object | None:
    """The newest pod of one node of a job; rank 0 is on the first."""
    pods = [pod for pod in cluster.list(PODS, labels) if _index(pod) == str(node)]
    return max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)


def _index(pod: Object) -> str:
    """Pods of a job of one node have no index."""
    return str((pod["metadata"].get("annotations") or {}).get(INDEX, "0"))


class LogReader:
    """New lines of a container's log since the last time."""

    def __init__(self, cluster: Cluster, pod: str, container: str) -> None:
        self._cluster, self.pod, self._container = cluster, pod, container
        self._second: str | None = None
        self._given = 0

    def lines(self) -> list[str]:
        """What was written since; nothing while the container does not run yet, or its pod or node is away.

        Raises:
            ClusterError: the right to read logs is missing.
        """
        try:
            text = self._cluster.log(self.pod, self._container, self._second)
        except ClusterError as error:
            if error.status == 403:
                raise
            return []
        # The server is asked for whole seconds, of which some lines were given already.
        stamped = [line.partition(" ") for line in text.splitlines() if line][self._given :]
        if stamped:
            second = _second(stamped[-1][0])
            before = self._given if second == self._second else 0
            self._given = before + sum(_second(stamp) == second for stamp, _, _ in stamped)
            self._second = second
        return [line for _, _, line in stamped]


def _second(stamp: str) -> str:
    """2026-11-22T07:00:01.123456789Z to the second."""
    return stamp[:19] + "Z"


class LogSink:
    """Lines to this process's own output and to the store, as objects of about a megabyte."""

    def __init__(self, store: Store, base: str) -> None:
        """`base` is the prefix of the objects."""
        self._store, self._base = store, base
        self._part, self._bytes, self._dirty = 0, b"", False
        self.tail: list[str] = []

    def write(self, lines: Iterable[str]) -> None:
        """Show lines, and keep them until `flush`."""
        for line in lines:
            clean = masked(line)
            print(clean, file=sys.stderr)
            self.tail = [*self.tail, clean][-TAIL:]
            self._bytes += clean.encode() + b"\n"
            self._dirty = True
            if len(self._bytes) >= CHUNK_BYTES:
                self.flush()
                self._part, self._bytes = self._part + 1, b""

    def flush(self) -> None:
        """Write the current object anew. A store that fails costs a log, never the work."""
        if self._dirty:
            try:
                self._store.put(f"{self._base}-{self._part:05d}.log", self._bytes)
            except StageError as error:
                print(f"the log is not in the store yet: {error}", file=sys.stderr)
            self._dirty = False
