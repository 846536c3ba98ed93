"""What every configuration section shares: strictness, descriptions, and what counts for the artifact key."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kernels = Literal["auto", "torch", "triton"]


class Section(BaseModel):
    """One frozen block of configuration. Unknown fields are errors; NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class StageSection(Section):
    """The configuration of one stage."""

    seed: int = Field(17, ge=0, description="seed of every random choice this stage makes")


def setting(default: Any = ..., doc: str = "", *, semantic: bool = True, **constraints: Any) -> Any:
    """Declare a field: default, the comment `k2 config show` prints, and pydantic constraints.

    `semantic=False` marks a field that cannot change the bytes a stage makes (endpoints, threads,
    timeouts, progress); it is left out of the artifact key.
    """
    return Field(default, description=doc, json_schema_extra={"semantic": semantic}, **constraints)


class TrainingSection(StageSection):
    """The configuration of one stage that trains the model."""

    kernels: Kernels = setting(
        "auto",
        "auto: Triton for half precision on CUDA, C for bfloat16 on a CPU, torch for the rest (last bits differ)",
        semantic=False,
    )


def is_semantic(section: type[Section], name: str) -> bool:
    """Whether a field takes part in the artifact key."""
    extra = section.model_fields[name].json_schema_extra
    return not (isinstance(extra, Mapping) and extra.get("semantic") is False)


def semantic_values(value: Any) -> Any:
    """The JSON value of a section without its non-semantic fields, recursively."""
    if isinstance(value, Section):
        cls = type(value)
        return {n: semantic_values(getattr(value, n)) for n in cls.model_fields if is_semantic(cls, n)}
    if isinstance(value, (list, tuple)):
        return [semantic_values(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): semantic_values(item) for key, item in value.items()}
    return value


def canonical_json(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, shortest floats. Raises ValueError on NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
