"""One command per stage: `k2 pretrain` runs pretraining alone."""

from pathlib import Path

import click

from k2.commands.options import configuration, echo, json_output, load, pairs
from k2.errors import UserError
from k2.execution.registry import STAGES, StageSpec
from k2.processes import rank


def _run_stage(
    stage: str, preset: str, file: Path | None, overrides: tuple[str, ...], inputs: dict[str, str]
) -> dict[str, object]:
    from k2.execution.chain import stage_config, upstream
    from k2.execution.local import object_store
    from k2.execution.ranks import refuse_several
    from k2.execution.runner import execute
    from k2.monitoring.events import progress_for
    from k2.store.artifacts import open_uri

    refuse_several(stage)  # before anything is looked up
    unknown = set(inputs) - set(STAGES[stage].inputs)
    if unknown:
        raise UserError(f"--input {unknown.pop()}: {stage} takes {', '.join(STAGES[stage].inputs) or 'no inputs'}")
    config, _ = load(preset, file, overrides)
    with object_store() as store:
        found = {name: open_uri(store, uri) for name, uri in inputs.items()}
        found |= upstream(config, stage, store, set(STAGES[stage].inputs) - set(found))
        outcome = execute(stage, stage_config(config, stage), found, store, progress_for(stage))
    return {
        "stage": stage,
        "artifact": outcome.artifact.uri,
        "cached": outcome.cached,
        "wall_s": round(outcome.wall_s, 3),
        "metrics": dict(outcome.metrics),
    }


def _command(spec: StageSpec) -> click.Command:
    sources = ", ".join(f"{name} (made by `{stage}`)" for name, stage in spec.inputs.items())
    needs = f"Inputs: {sources}." if sources else "It needs no inputs."

    @click.command(
        spec.name, help=f"{spec.title}.\n\n{needs} They are found by the configuration, or given with --input."
    )
    @configuration
    @click.option("--input", "inputs", multiple=True, metavar="NAME=URI", help="Take this artifact; repeatable.")
    @json_output
    def command(
        preset: str, file: Path | None, overrides: tuple[str, ...], inputs: tuple[str, ...], as_json: bool
    ) -> None:
        result = _run_stage(spec.name, preset, file, overrides, pairs(inputs, "--input"))
        if rank() == 0:
            echo(result, as_json, f"{'cached' if result['cached'] else 'done'}: {result['artifact']}")

    return command


COMMANDS = tuple(_command(spec) for spec in STAGES.values() if spec.name != "report")
