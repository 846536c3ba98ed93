"""A stage that several processes make together under torchrun: rank 0 leads and publishes, the others follow."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from k2.config.base import Section
from k2.config.deployment import DISTRIBUTED
from k2.errors import UserError
from k2.execution.contract import Progress, StageResult
from k2.execution.registry import StageSpec
from k2.processes import world_size
from k2.store.artifacts import Artifact, ArtifactWriter, FileEntry, open_uri
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

MAKE = "make"
"""Rank 0's word that there is work."""


def refuse_several(stage: str) -> None:
    """Stages that one process makes.

    Raises:
        UserError: several were started.
    """
    if world_size() > 1 and stage not in DISTRIBUTED:
        raise UserError(
            f"{stage}: torchrun started {world_size()} ranks, but one process makes this stage; run `k2 {stage}`"
            f" without torchrun (several ranks make {', '.join(sorted(DISTRIBUTED))})"
        )


def announce(name: str, word: str) -> None:
    """As rank 0, tell the others: `work` is MAKE or the URI of what is there already, `result` of what was made."""
    if world_size() > 1:
        from k2.distributed.meeting import tell

        tell(name, word)


class Follower(ArtifactWriter):
    """What ranks but the first write to: what they upload is in the first one's artifact, which is theirs too."""

    def publish(self, others: Sequence[FileEntry] = (), /, **statistics: Any) -> Artifact:
        """Wait for what rank 0 publishes."""
        from k2.distributed.meeting import hear

        return open_uri(self.store, hear("result"))


def follow(
    spec: StageSpec, config: Section, inputs: Mapping[str, Artifact], store: Store, key: str, progress: Progress
) -> Artifact:
    """Do another rank's share of the work, if rank 0 says that there is any; returns what rank 0 published."""
    from k2.distributed.meeting import hear

    word = hear("work")
    if word != MAKE:
        return open_uri(store, word)
    writer = Follower(store, spec.name, key, WorkArea(store, key, Lease(store, f"work/{key}/lease.json")))
    try:
        result: StageResult = importlib.import_module(spec.module).run(config, inputs, writer, progress=progress)
    finally:
        writer.discard()
    return result.artifact
