"""From a study to the configuration of one training."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from k2.config.ablations import StudyConfig
from k2.config.base import Section
from k2.config.k2 import K2Config
from k2.config.load import load_config, merge
from k2.config.tune import TuneConfig
from k2.errors import UserError
from k2.store.artifacts import Artifact


def study_config(study: StudyConfig, preset: str, overrides: Mapping[str, Any], run: str = "") -> K2Config:
    """The preset, over it the study's setting for that preset, over it what the user changed.

    Raises:
        UserError: unknown preset or field, bad value.
    """
    return load_config(preset, merge(study.settings.get(preset, {}), overrides) | {"run": run})


def shared_section(study: StudyConfig, config: K2Config) -> Section:
    """What all arms have in common: the preset's pretraining, or the defaults of training that follows it."""
    return config.pretrain if study.stage == "pretrain" else TuneConfig()


def arm_config(shared: Section, fields: Mapping[str, Any], seed: int) -> Section:
    """The shared section with an arm's fields and a seed.

    Raises:
        UserError: a field does not exist or does not fit the others.
    """
    values = merge(shared.model_dump(mode="json"), fields) | {"seed": seed}
    try:
        return type(shared).model_validate(values)
    except ValidationError as error:
        raise UserError(f"arm with {dict(fields)}: {error}") from None


def best_candidate(candidates: Sequence[Artifact], field: str) -> Any:
    """The value of `field` with the lowest mean held-out loss over its candidates."""
    losses: dict[Any, list[float]] = defaultdict(list)
    for candidate in candidates:
        losses[candidate.manifest.provenance["config"][field]].append(candidate.statistics["heldout_loss"])
    return min(sorted(losses), key=lambda value: fmean(losses[value]))
