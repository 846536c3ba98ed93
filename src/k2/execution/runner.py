"""Running one stage: find what exists, else hold the lease, run, publish."""

import importlib
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2.config.base import Section
from k2.errors import StageError
from k2.execution.contract import Progress, StageResult
from k2.execution.digest import artifact_key, code_digest
from k2.execution.ranks import MAKE, announce, follow, refuse_several
from k2.execution.registry import StageSpec, stage_spec
from k2.platform.pods import LAUNCH_VARIABLE
from k2.processes import rank
from k2.store.artifacts import Artifact, ArtifactWriter, find
from k2.store.client import Store
from k2.store.lease import Holder, Lease
from k2.store.work import WorkArea

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What running a stage led to. `cached`: nothing had to be done."""

    artifact: Artifact
    metrics: Mapping[str, Any]
    cached: bool
    wall_s: float


def execute(
    stage: str,
    config: Section,
    inputs: Mapping[str, Artifact],
    store: Store,
    progress: Progress,
    run: str = "",
    preset: str = "",
) -> Outcome:
    """Return the stage's artifact, making it only when it is not there yet or no longer intact.

    A task of a pool that launches jobs (`K2_LAUNCH` is set) has a job of run `run` make it, marked with `preset`. Of
    several ranks under torchrun the first one does all this, and the others take part in the work.

    Raises:
        UserError: bad input; the message says what to change.
        StageError: the stage could not finish.
    """
    started = time.monotonic()
    spec = stage_spec(stage)
    _require_inputs(spec, inputs)
    refuse_several(stage)
    key = key_of(stage, config, inputs, store)
    if rank() > 0:
        made = follow(spec, config, inputs, store, key, progress)
        return Outcome(made, made.statistics, False, time.monotonic() - started)
    if not spec.always:
        done = _intact(store, stage, key)
        if done is not None:
            return _cached(done, started)
        if os.environ.get(LAUNCH_VARIABLE):
            artifact = _launched(stage, config, inputs, store, progress, run, preset, key)
            return Outcome(artifact, artifact.statistics, False, time.monotonic() - started)

    def published(holder: Holder) -> bool:
        progress.event("waiting", holder=f"{holder.host}:{holder.pid}")
        return find(store, stage, key) is not None

    reads = [artifact.uri for artifact in inputs.values()]
    with Lease(store, f"work/{key}/lease.json", waiting=published, reads=reads) as lease:
        done = None if spec.always else _intact(store, stage, key)
        if done is not None:
            return _cached(done, started)
        result = _run(spec, config, inputs, store, key, lease, progress)
    cached = spec.always and not result.metrics["changed"]
    return Outcome(result.artifact, result.metrics, cached, time.monotonic() - started)


def _cached(artifact: Artifact, started: float) -> Outcome:
    announce("work", artifact.uri)
    return Outcome(artifact, artifact.statistics, True, time.monotonic() - started)


def _launched(
    stage: str,
    config: Section,
    inputs: Mapping[str, Artifact],
    store: Store,
    progress: Progress,
    run: str,
    preset: str,
    key: str,
) -> Artifact:
    from k2.launch.launcher import launch
    from k2.launch.work import Work

    uris = {name: artifact.uri for name, artifact in sorted(inputs.items())}
    work = Work(run=run, preset=preset, stage=stage, config=config.model_dump(mode="json"), inputs=uris, key=key)
    return launch(work, os.environ[LAUNCH_VARIABLE], store, progress)


def lookup(stage: str, config: Section, inputs: Mapping[str, Artifact], store: Store) -> Artifact | None:
    """The stage's artifact if it was made already, without running anything."""
    return find(store, stage, key_of(stage, config, inputs, store))


def key_of(stage: str, config: Section, inputs: Mapping[str, Artifact], store: Store) -> str:
    """The key of what a stage makes; of a stage that always runs, a new one each time."""
    spec = stage_spec(stage)
    return artifact_key(spec, config, inputs, _external(spec, config, store))


def _require_inputs(spec: StageSpec, inputs: Mapping[str, Artifact]) -> None:
    if not spec.collects and set(inputs) != set(spec.inputs):
        raise StageError(f"{spec.name} takes the inputs {sorted(spec.inputs)}, got {sorted(inputs)}")


def _external(spec: StageSpec, config: Section, store: Store) -> str | None:
    if spec.always:
        return uuid.uuid4().hex
    if spec.external is None:
        return None
    fingerprint: str = importlib.import_module(f"k2.{spec.external}").fingerprint(config, store)
    return fingerprint


def _intact(store: Store, stage: str, key: str) -> Artifact | None:
    artifact = find(store, stage, key)
    if artifact is None or artifact.intact():
        return artifact
    log.warning("%s is incomplete or corrupt and is made anew", artifact.uri)
    return None


def _run(
    spec: StageSpec,
    config: Section,
    inputs: Mapping[str, Artifact],
    store: Store,
    key: str,
    lease: Lease,
    progress: Progress,
) -> StageResult:
    stale = store.get_tagged(f"{spec.name}/{key}/manifest.json")
    provenance = {
        "code": code_digest(spec.module),
        "config": config.model_dump(mode="json"),
        "inputs": {name: artifact.uri for name, artifact in inputs.items()},
    }
    work = WorkArea(store, key, lease)
    writer = ArtifactWriter(store, spec.name, key, work, provenance, stale[1] if stale else None)
    announce("work", MAKE)
    try:
        result: StageResult = importlib.import_module(spec.module).run(config, inputs, writer, progress=progress)
    finally:
        writer.discard()
    work.clear()
    announce("result", result.artifact.uri)
    return result
