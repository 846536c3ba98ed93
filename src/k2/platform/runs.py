"""Runs on the API server: submit, follow, stop."""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import yaml

from k2.config.load import load_config, parse_document
from k2.errors import StageError, UserError
from k2.monitoring.format import duration
from k2.platform.api import ENDED, ApiError, PipelinesApi, UnreachableError
from k2.platform.versions import specs

log = logging.getLogger(__name__)

POLL_S = 5.0
"""Seconds between two looks at a followed run."""

PATIENCE_S = 600.0
"""Seconds for which a followed run may be unreachable."""

_WORDS = {"SUCCEEDED": "done", "SKIPPED": "skipped", "FAILED": "failed", "CANCELED": "canceled"}
_KINDS: Mapping[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


WhenRunning = Literal["allow", "forbid", "replace"]
"""What happens to the next run of a series while one is going on."""


@dataclass(frozen=True)
class Submitted:
    """A run, and whether it was there before."""

    run_id: str
    name: str
    adopted: bool


def submit(api: PipelinesApi, version: Any, values: Mapping[str, str], name: str | None) -> Submitted:
    """Start a run, or adopt the one of this name that is alive or done.

    Submitting again under a name is safe: after a failure there is a new run, which continues the work, because the
    name is also that of the record and the artifacts' keys do not depend on it.

    Raises:
        UserError: an unknown or bad parameter, or a run of this name does something else.
    """
    parameters = typed(values, version, name)
    title = name or f"{version.name or version.display_name}-{secrets.token_hex(3)}"
    if name:
        for run in api.runs(name):
            if run.state in ("FAILED", "CANCELED", "SKIPPED"):
                break
            if not _same(run, version, parameters):
                raise UserError(
                    f"--name {name}: run {run.run_id} has this name and does something else; choose another"
                )
            return Submitted(run.run_id, name, adopted=True)
    created = api.create_run(title, version, parameters)
    return Submitted(created.run_id, title, adopted=False)


def submit_next(
    api: PipelinesApi, version: Any, values: Mapping[str, str], series: str, when_running: WhenRunning
) -> Submitted | None:
    """Start the next run of a series, such as a CronJob's; None when one is going on and `when_running` is forbid.

    With replace, runs of the series that are going on are told to stop first.

    Raises:
        UserError: an unknown or bad parameter.
    """
    going_on = [] if when_running == "allow" else [run for run in api.series(series) if run.state not in ENDED]
    if going_on and when_running == "forbid":
        return None
    for run in going_on:
        cancel(api, run.run_id)
    return submit(api, version, values, f"{series}-{secrets.token_hex(3)}")


def typed(values: Mapping[str, str], version: Any, name: str | None = None) -> dict[str, Any]:
    """Parameters as the version wants them; `name` becomes the run's name in the store unless that is given.

    Raises:
        UserError: no such parameter, not of its type, or a configuration that would be refused.
    """
    known = specs(version)[0].get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    for key in values:
        if key not in known:
            raise UserError(f"parameter {key!r}: the pipeline has none; its parameters are {', '.join(sorted(known))}")
    parameters = {key: _value(key, text, known[key]["parameterType"]) for key, text in values.items()}
    if name and "run" in known:
        parameters.setdefault("run", name)
    if {"preset", "overrides"} <= set(known):
        defaults = {key: known[key].get("defaultValue", "") for key in ("preset", "overrides")}
        chosen = defaults | parameters
        load_config(chosen["preset"], parse_document(chosen["overrides"], "overrides"))
    return parameters


def _value(name: str, text: str, kind: str) -> Any:
    value = text if kind == "STRING" else yaml.safe_load(text)
    wanted = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise UserError(f"parameter {name}: {text!r} is no {kind.lower().replace('_', ' ')}")
    return value


def _same(run: Any, version: Any, parameters: Mapping[str, Any]) -> bool:
    given = run.runtime_config.parameters if run.runtime_config else None
    return run.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id and (given or {}) == dict(
        parameters
    )


def watch(api: PipelinesApi, run_id: str, stream: TextIO) -> str:
    """Write a line when a task of the run changes, until the run has ended; returns its final state.

    An API server that fails or is away for less than `PATIENCE_S` is waited for.

    Raises:
        UserError: there is no such run.
        StageError: the API server stayed away.
    """
    seen: dict[str, str] = {}
    titles: Mapping[str, str] | None = None
    for run in _states(api, run_id):
        titles = _titles(api, run) if titles is None else titles
        for task, title, state, line in _changes(run, titles):
            if seen.get(task) != state:
                stream.write(f"{title}: {line}\n")
                seen[task] = state
        stream.flush()
    if run.error and run.error.message:
        stream.write(f"{run.error.message}\n")
    return str(run.state)


def cancel(api: PipelinesApi, run_id: str) -> str:
    """Ask a run to stop unless it has ended; returns its state before.

    Raises:
        UserError: there is no such run.
    """
    run = _existing(api, run_id)
    if run.state not in ENDED and run.state != "CANCELING":
        api.terminate(run_id)
    return str(run.state)


def _existing(api: PipelinesApi, run_id: str) -> Any:
    run = api.run(run_id)
    if run is None:
        raise UserError(f"run {run_id!r}: there is none on {api.endpoint}; its ID is in the address of its page")
    return run


def _states(api: PipelinesApi, run_id: str) -> Iterator[Any]:
    """The run again and again, until it has ended."""
    run, answered = _existing(api, run_id), time.monotonic()
    yield run
    while run.state not in ENDED:
        time.sleep(POLL_S)
        try:
            run = _existing(api, run_id)
        except (ApiError, UnreachableError) as error:
            if isinstance(error, ApiError) and 400 <= error.status < 500 and error.status not in (401, 429):
                raise
            if time.monotonic() - answered > PATIENCE_S:
                raise StageError(f"{error}; the run may still be at work") from None
            log.warning("%s; trying again", error)
            continue
        answered = time.monotonic()
        yield run


def _titles(api: PipelinesApi, run: Any) -> dict[str, str]:
    """Task -> display name, for the tasks that are no groups."""
    source = run
    if not run.pipeline_spec:
        reference = run.pipeline_version_reference
        source = api.version(reference.pipeline_id, reference.pipeline_version_id) or run
    spec = specs(source)[0]
    components = spec.get("components", {})
    graphs = [spec.get("root", {}), *components.values()]
    tasks = {name: task for graph in graphs for name, task in graph.get("dag", {}).get("tasks", {}).items()}
    leaves = {name: task for name, task in tasks.items() if "dag" not in components[task["componentRef"]["name"]]}
    return {name: task.get("taskInfo", {}).get("name", name) for name, task in leaves.items()}


def _changes(run: Any, titles: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """Task, title, state and line of every task that has started."""
    details = (run.run_details.task_details if run.run_details else None) or ()
    for task in details:
        title = titles.get(task.display_name)
        if title is None or not task.state or task.state == "RUNTIME_STATE_UNSPECIFIED":
            continue
        line = _WORDS.get(task.state, task.state.lower())
        if task.start_time and task.end_time and task.state in ENDED:
            line += f" in {duration((task.end_time - task.start_time).total_seconds())}"
        if task.error and task.error.message:
            line += f": {' '.join(task.error.message.split())}"
        yield task.display_name, title, task.state, line
