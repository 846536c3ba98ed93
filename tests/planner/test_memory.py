"""Planned memory against what the allocator says of real steps, by component; and constants that the engine has too."""

from dataclasses import replace
from typing import Any

import pytest

from k2.config.load import load_config
from k2.config.pretrain import PretrainConfig
from k2.distributed.zero import BUCKET_VALUES
from k2.model.loss import KEPT_VALUES
from k2.model.mla import QUERY_BLOCK
from k2.optim.newton_schulz import CHUNK_BYTES
from k2.planner import activations, memory
from k2.planner.layout import PUBLISHED_RECOMPUTE, default_layout
from k2.planner.memory import stage_memory
from k2.training.footprint import Footprint, measure

SWITCHES: list[dict[str, Any]] = [
    {},
    {"recompute": PUBLISHED_RECOMPUTE},
    {"recompute": PUBLISHED_RECOMPUTE, "fp8_storage": True, "offload_activations": True},
    {"param_dtype": "bfloat16", "recompute": ("layers",)},
]


def compared(config: PretrainConfig, tokens: int) -> dict[str, tuple[float, int]]:
    """Planned and measured bytes by component."""
    found = measure(config, tokens)
    planned = stage_memory(config, replace(default_layout(config), micro_batch_tokens=tokens), 0, "cpu")
    components = {name: getattr(planned, name) for name in ("parameters", "gradients", "optimizer", "host")}
    components |= {"activations": planned.activations + planned.logits, "total": planned.gpu}
    return {name: (value, getattr(found, name)) for name, value in components.items()}


def of(preset: str, tokens: int, **changes: Any) -> PretrainConfig:
    return load_config(preset).pretrain.model_copy(update={"batch_tokens": tokens, **changes})


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_tiny_takes_what_is_planned(switches: dict[str, Any]) -> None:
    for name, (planned, measured) in compared(of("tiny", 2048, **switches), 2048).items():
        assert planned == pytest.approx(measured, rel=0.05 if name != "total" or not switches else 0.1), name


def test_small_takes_what_is_planned() -> None:
    """Rows of 256 tokens, for time; the benchmark has rows of 2,048."""
    for name, (planned, measured) in compared(of("small", 256, context_length=256), 256).items():
        assert planned == pytest.approx(measured, rel=0.05), name


def test_constants_are_those_of_the_engine() -> None:
    assert activations.QUERY_BLOCK == QUERY_BLOCK
    assert activations.KEPT_LOGITS == KEPT_VALUES
    assert memory.BUCKET_VALUES == BUCKET_VALUES
    assert memory.NEWTON_SCHULZ_BYTES == CHUNK_BYTES
    assert Footprint(1, 2, 3, 4, 5, 6).total == 15
