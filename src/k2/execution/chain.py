"""Finding a stage's inputs among what was made already, from the configuration alone."""

from collections.abc import Collection

from k2.config.base import Section
from k2.config.k2 import K2Config
from k2.errors import UserError
from k2.execution.registry import STAGES
from k2.execution.runner import lookup
from k2.store.artifacts import Artifact
from k2.store.client import Store


def stage_config(config: K2Config, stage: str) -> Section:
    """The section that configures a stage."""
    section: Section = getattr(config, stage)
    return section


def upstream(config: K2Config, stage: str, store: Store, names: Collection[str]) -> dict[str, Artifact]:
    """The named input artifacts of a stage under this configuration.

    Raises:
        UserError: one was not made yet; the message names the command that makes it.
    """
    made: dict[str, Artifact] = {}
    return {name: _made(config, STAGES[stage].inputs[name], store, made) for name in sorted(names)}


def _made(config: K2Config, stage: str, store: Store, made: dict[str, Artifact]) -> Artifact:
    if stage not in made:
        inputs = {name: _made(config, source, store, made) for name, source in STAGES[stage].inputs.items()}
        found = lookup(stage, stage_config(config, stage), inputs, store)
        if found is None:
            raise UserError(
                f"{stage}: not made yet with this configuration; run `k2 {stage} --preset {config.preset}` first,"
                " or `k2 run` for everything"
            )
        made[stage] = found
    return made[stage]
