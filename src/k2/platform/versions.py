"""Pipelines and their versions on the API server: upload what is new, remove what nobody uses."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2.errors import UserError
from k2.platform.api import ENDED, PipelinesApi
from k2.platform.render import PIPELINES, SPEC_TAG, Rendering, spec_digest


@dataclass(frozen=True)
class Uploaded:
    """A version, and whether this upload made it."""

    pipeline: str
    version: str
    new: bool


def is_there(api: PipelinesApi, rendering: Rendering) -> bool:
    """Whether the rendering is a version of its pipeline already.

    Raises:
        UserError: a version of that name has other content.
    """
    pipeline = api.pipeline(rendering.pipeline)
    for version in api.versions(pipeline.pipeline_id) if pipeline else ():
        if rendering.version in (version.name, version.display_name):
            if _digest(version) != rendering.digest:
                raise UserError(
                    f"{rendering.version}: the API server has a version of this name with other content, which K2 did"
                    " not upload; delete it there, and upload again"
                )
            return True
    return False


def upload(api: PipelinesApi, renderings: Sequence[Rendering], revision: str) -> list[Uploaded]:
    """Make sure that each rendering is a version of its pipeline; all are looked at before any is made.

    Raises:
        UserError: a version of one's name has other content.
    """
    there = [is_there(api, each) for each in renderings]
    for rendering in (each for each, known in zip(renderings, there, strict=True) if not known):
        pipeline = api.pipeline(rendering.pipeline) or api.create_pipeline(rendering.pipeline, rendering.description)
        api.upload_version(pipeline.pipeline_id, rendering, revision)
    return [Uploaded(each.pipeline, each.version, not known) for each, known in zip(renderings, there, strict=True)]


def find_version(api: PipelinesApi, pipeline: str, name: str | None) -> Any:
    """A version by name, or the newest.

    Raises:
        UserError: there is none.
    """
    found = api.pipeline(pipeline)
    versions = api.versions(found.pipeline_id) if found else []
    if not versions:
        raise UserError(f"pipeline {pipeline!r}: not on {api.endpoint}; `k2 pipeline upload` puts it there")
    chosen = [each for each in versions if name is None or name in (each.name, each.display_name)]
    if not chosen:
        known = ", ".join(str(each.name or each.display_name) for each in versions[:5])
        raise UserError(f"version {name!r}: {pipeline} has none of that name; the newest are {known}")
    return chosen[0]


def specs(version: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The pipeline's and the platform's specification of a version."""
    spec = version.pipeline_spec or {}
    return (spec["pipeline_spec"], spec.get("platform_spec", {})) if "pipeline_spec" in spec else (spec, {})


def prune(api: PipelinesApi, keep: int, *, dry_run: bool) -> list[str]:
    """Remove versions that K2 uploaded and nothing uses, except the newest `keep` of a pipeline; returns their names.

    A version is in use when a recurring run or a run that has not ended names it.
    """
    live = [*api.recurring_runs(), *(run for run in api.runs() if run.state not in ENDED)]
    used = {_version_id(each) for each in live}
    removed: list[str] = []
    for name in PIPELINES:
        pipeline = api.pipeline(name)
        ours = [each for each in api.versions(pipeline.pipeline_id) if _is_ours(name, each)] if pipeline else []
        for version in ours[keep:]:
            if version.pipeline_version_id not in used:
                removed.append(str(version.name or version.display_name))
                if not dry_run:
                    api.delete_version(version.pipeline_id, version.pipeline_version_id)
    return removed


def _digest(version: Any) -> str:
    """What K2 noted when it uploaded the version, otherwise the digest of what the server holds."""
    return str((version.tags or {}).get(SPEC_TAG) or spec_digest(*specs(version)))


def _is_ours(pipeline: str, version: Any) -> bool:
    return re.fullmatch(rf"{pipeline}-[0-9a-f]{{12}}", str(version.name or version.display_name)) is not None


def _version_id(run: Any) -> str | None:
    reference = run.pipeline_version_reference
    found: str | None = (reference.pipeline_version_id if reference else None) or run.pipeline_version_id
    return found
