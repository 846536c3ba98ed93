"""Stage `promote`: move the champion alias when the gate decided so."""

import json
from typing import Any

from k2.config.promote import PromoteConfig
from k2.errors import StageError
from k2.execution.contract import Progress, StageResult
from k2.store.aliases import move_alias, read_alias
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import ConflictError, Store


def run(
    config: PromoteConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Point the alias at the export, if the champion is still the one that the gate compared with.

    Raises:
        StageError: another run moved the alias meanwhile.
    """
    export, decision = inputs["export"], inputs["decision"].json("decision.json")
    moved = decision["promote"] and config.enabled and _move(output.store, decision, export)
    champion = read_alias(output.store, decision["alias"]).uri
    if moved:
        progress.event("promoted", alias=decision["alias"], uri=champion)
    metrics = {"changed": moved, "alias": decision["alias"], "champion": champion}
    output.path("promotion.json").write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    return StageResult(output.publish(**metrics))


def _move(store: Store, decision: dict[str, Any], export: Artifact) -> bool:
    alias = read_alias(store, decision["alias"])
    current, compared = alias.artifact(store), decision["champion"] or {"uri": None, "digest": None}
    digest = current.digest if current else None
    if digest == export.digest:
        return False
    try:
        if digest != compared["digest"]:
            raise ConflictError(f"the alias points at {alias.uri}, the gate compared with {compared['uri']}")
        move_alias(store, alias, export)
    except ConflictError as error:
        raise StageError(
            f"alias {alias.name}: another run moved it after the gate decided ({error}); run again to compare with"
            " the new champion"
        ) from None
    return True
