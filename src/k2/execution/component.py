"""What the KFP components call: from component arguments to a stage and back."""

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from k2.config.base import Section
from k2.config.load import load_config, parse_document, validate
from k2.config.report import ReportConfig
from k2.errors import StageError, UserError
from k2.execution.registry import stage_spec
from k2.execution.runner import Outcome, execute
from k2.masking import install, masked
from k2.monitoring.events import progress_for
from k2.monitoring.run_record import read_run, write_stage_record
from k2.platform.pods import JOBS_VARIABLE, NEEDS_VARIABLE, PRESET_VARIABLE, STORE_KEYS
from k2.processes import end_with_run
from k2.store.artifacts import Artifact, Manifest
from k2.store.client import Store

log = logging.getLogger(__name__)

CLEANUP_S = 120.0
"""Seconds that the exit task waits for an API server which does not answer."""


CHECK_S = 120.0
"""Seconds that the first step waits for an API server which does not answer."""


def resolve_config(preset: str, overrides: str, run: str) -> str:
    """The validated configuration as one JSON string, in a cluster that has all that its deployment file names.

    Raises:
        SystemExit: 2 when it is not valid or something is missing, 1 when the cluster does not answer.
    """
    end_with_run()
    try:
        config = load_config(preset, parse_document(overrides, "overrides") | {"run": run})
        admit(preset)
    except (UserError, StageError) as error:
        leave(error)
    return config.model_dump_json()


def admit(preset: str) -> None:
    """Whether the deployment allows runs of a preset, and its cluster has all that it names.

    The first step of each pipeline asks, before anything else is started. Outside a cluster nothing is looked up.

    Raises:
        UserError: another preset, or what is missing, with fields and fixes.
        StageError: the API server does not answer.
    """
    only = os.environ.get(PRESET_VARIABLE, preset)
    if preset != only:
        raise UserError(f"preset: {preset!r} is not {only!r}, the only one that the deployment file allows")
    needs = os.environ.get(NEEDS_VARIABLE)
    if not needs or "KUBERNETES_SERVICE_HOST" not in os.environ:
        return
    from k2.launch.cluster import Cluster
    from k2.launch.preflight import require
    from k2.platform.needs import Needs

    require(Cluster.connect(patience_s=CHECK_S), Needs.model_validate_json(needs))
    # Where Secrets may not be looked for, the variables that come of them tell.
    absent = [name for name in STORE_KEYS if name not in os.environ]
    if absent:
        raise UserError(f"store.secret: the Secret that it names is not there, or has no {', '.join(absent)}")


def run_component(stage: str, config_json: str, artifact: Any, metrics: Any, **inputs: Any) -> Artifact:
    """Run one stage for KFP: inputs are small manifest files, and so is the output. Returns what was made.

    What it adds to the run's report is published at once: a run that fails, or is never heard of again, has one too.

    Raises:
        SystemExit: 2 for a user error, 1 for any other; the error is in the run's record.
    """
    config = validate(json.loads(config_json))
    opened = {name: Path(each.path).read_text() for name, each in inputs.items()}
    try:
        outcome = recorded(stage, getattr(config, stage), opened, config.run, preset=config.preset)
    except SystemExit:
        _publish_pages(config.run, config.preset, "failed")
        raise
    if not outcome.cached:
        _publish_pages(config.run, config.preset, "running")
    deliver(outcome, artifact, metrics)
    return outcome.artifact


def _publish_pages(run: str, preset: str, status: str) -> None:
    """Never at the expense of the stage: the exit handler tries again."""
    from k2.monitoring.report import publish_pages

    try:
        publish_pages(Store.from_environment(), run, preset, status)
    except StageError as error:
        log.warning("the report of %s is not up to date: %s", run, error)


def deliver(outcome: Outcome, artifact: Any, metrics: Any) -> None:
    """Hand an outcome to KFP: the manifest as the artifact's file, scalars as metrics."""
    Path(artifact.path).write_text(outcome.artifact.manifest.model_dump_json(indent=1))
    artifact.metadata |= {"s3_uri": outcome.artifact.uri, "digest": outcome.artifact.digest, "cached": outcome.cached}
    log_metrics(metrics, outcome.metrics)


def run_report(preset: str, run: str, state: str, page: Any, metrics: Any) -> None:
    """Write the report of a run; `state` is KFP's final state of the handled tasks."""
    _delete_jobs(run)
    config = ReportConfig(run=run, preset=preset, status="done" if state == "SUCCEEDED" else "failed")
    outcome = recorded("report", config, {}, run)
    Path(page.path).write_bytes(outcome.artifact.path("report.html").read_bytes())
    log_metrics(metrics, outcome.metrics)


def _delete_jobs(run: str) -> None:
    """Nothing that a run launched outlives it. A cluster that does not answer costs no report: jobs have deadlines."""
    kinds = os.environ.get(JOBS_VARIABLE)
    if not kinds:
        return
    from k2.launch.cluster import Cluster
    from k2.launch.launcher import delete_live_jobs

    try:
        for name in delete_live_jobs(Cluster.connect(patience_s=CLEANUP_S), run, kinds.split(",")):
            log.warning("job %s still worked or waited and is deleted", name)
    except (StageError, UserError) as error:
        log.error("jobs of %s are left to their deadlines: %s", run, error)


def recorded(
    stage: str, config: Section, manifests: Mapping[str, str], run: str, label: str | None = None, preset: str = ""
) -> Outcome:
    """Execute a stage and keep its state in the run's record, whatever happens.

    `label` names it there, in a run that has the same stage several times; `preset` is written on jobs.
    """
    end_with_run()
    install()
    name, store = label or stage, Store.from_environment()
    progress = progress_for(name, run)
    progress.event("stage_started")
    write_stage_record(store, run, {"stage": name, "status": "running"})
    try:
        inputs = {name: Artifact(store, Manifest.model_validate_json(text)) for name, text in manifests.items()}
        outcome = execute(stage, config, inputs, store, progress, run, preset)
    except BaseException as error:
        write_stage_record(store, run, {"stage": name, "status": "failed", "error": describe(error)})
        progress.event("stage_finished", status="failed", error=describe(error)["message"])
        leave(error)
    outcome = replace(outcome, cached=outcome.cached and not _judged_new(stage, store, run))
    record = {
        "stage": name,
        "status": "done",
        "wall_s": round(outcome.wall_s, 3),
        "cached": outcome.cached,
        "artifact": outcome.artifact.uri,
        "metrics": outcome.metrics,
    }
    write_stage_record(store, run, record)
    progress.event("stage_finished", status="done", cached=outcome.cached, metrics=outcome.metrics)
    return outcome


def _judged_new(stage: str, store: Store, run: str) -> bool:
    """Whether a stage that always runs had something new before it; then it did its work, also when nothing moves."""
    spec = stage_spec(stage)
    before = {each["stage"] for each in read_run(store, run) if not each["cached"]} if spec.always else set()
    return bool(before & set(spec.inputs.values()))


def describe(error: BaseException) -> dict[str, Any]:
    """An error as the run's record keeps it: message, kind, exit code."""
    message = str(error) if expected(error) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = f"no space left on disk{f' for {error.filename}' if error.filename else ''}; free some and run again"
    code = 2 if isinstance(error, UserError) else 1
    return {"message": masked(message), "type": type(error).__name__, "exit_code": code}


def expected(error: BaseException) -> bool:
    """Whether an error is about the user's input or the surroundings rather than a defect of k2."""
    return isinstance(error, (UserError, StageError)) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def leave(error: BaseException) -> NoReturn:
    """End the process: one line for expected errors, a traceback for a defect."""
    if expected(error):
        print(f"error: {describe(error)['message']}", file=sys.stderr)
    else:
        sys.stderr.write(masked("".join(traceback.format_exception(error))))
    sys.stderr.flush()
    raise SystemExit(describe(error)["exit_code"])


def log_metrics(output: Any, metrics: Mapping[str, Any]) -> None:
    """Log scalars to a KFP Metrics artifact; what was not finite is text there, and `nonfinite` names it."""
    odd = metrics.get("nonfinite", [])
    output.metadata |= {name: str(metrics[name]) for name in odd} | ({"nonfinite": ", ".join(odd)} if odd else {})
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            output.log_metric(name, value)
