"""The suite: what it measures, that intervals and protocols follow from it, and unseen tools."""

import math

import numpy as np
import pytest

from k2.agentic.tools import ToolSpec
from k2.config.evaluate import EvaluateConfig
from k2.errors import UserError
from k2.evaluation.harness import heldout_loss
from k2.evaluation.suite import BLOCK_ROWS, PERPLEXITY, Suite, heldout_tool_tasks
from k2.model.transformer import Transformer
from tests.quant.tiny import TINY, model, tokenizer

CONFIG = EvaluateConfig(
    tasks=("addition_1",),
    items=6,
    max_tokens=4,
    tool_items=3,
    heldout_tokens=2000,
    context_length=16,
    samples=2,
    precision="float32",
)
TEXT = np.random.default_rng(0).integers(0, 300, 700).astype(np.uint16)
OFFSETS = np.array([0, 50, 333, 500, 700], dtype=np.int64)


def spec(name: str, world: str, kind: str = "string") -> ToolSpec:
    parameters = {"type": "object", "properties": {"a": {"type": kind}}, "required": ["a"]}
    return ToolSpec(name=name, description=f"Do {name}", parameters=parameters, world=world, category="x")


def suite(config: EvaluateConfig = CONFIG, tools=()) -> Suite:
    return Suite(config, tokenizer(), TEXT, OFFSETS, tools)


@pytest.fixture(scope="module")
def unseen():
    specs = [spec("convert", "mcp:time"), spec("heat", "evolved:heating"), spec("cool", "evolved:heating", "integer")]
    return heldout_tool_tasks([*specs, *specs], tokenizer(), 900)


def test_names_values_and_intervals(unseen):
    scores = suite(tools=unseen).measure(model())
    names = {"addition_1", "heldout_servers", "heldout_domains"}
    assert set(scores) == {PERPLEXITY} | {f"{n}/{mode}" for n in names for mode in ("sampled", "greedy")}
    assert all(score.low <= score.value <= score.high for score in scores.values())
    assert {scores[f"{n}/greedy"].n for n in names} == {6, 3}
    assert scores[PERPLEXITY].better == "lower"


def test_perplexity_is_that_of_the_whole_text():
    measured = suite()._perplexity(model())
    blocks = (len(TEXT) - 1) // (BLOCK_ROWS * 16)
    length = blocks * BLOCK_ROWS * 16
    whole = heldout_loss(model(), TEXT[: length + 1], np.append(OFFSETS[:-1], length + 1), 16)
    assert measured.n == length
    assert math.log(measured.value) == pytest.approx(whole, rel=2e-3)
    assert math.log(measured.value) != pytest.approx(math.log(TINY.vocab_size), abs=0.01)


def test_blocks_keep_document_starts():
    rows = suite()._blocks()
    tokens, offsets = rows[1]
    assert np.array_equal(tokens, TEXT[32:65])
    assert offsets.tolist() == [0, 18, 33]


def test_too_little_text_names_the_field():
    config = CONFIG.model_copy(update={"context_length": 400})
    with pytest.raises(UserError, match=r"evaluate\.context_length"):
        suite(config).measure(model())


def test_protocol_tells_measurements_apart_and_is_stable():
    config = CONFIG.model_copy(update={"seed": 18})
    first, second, other = (suite(c).measure(model())["addition_1/greedy"] for c in (CONFIG, CONFIG, config))
    assert first == second
    assert first.protocol != other.protocol


def test_long_declarations_and_odd_tools_are_left_out(caplog):
    long = spec("long" * 40, "mcp:time")
    odd = ToolSpec(name="odd", description="", parameters={"type": "object"}, world="evolved:x", category="x")
    assert heldout_tool_tasks([long, odd], tokenizer(), 200) == []
    assert "too long" in caplog.text
    assert "heldout_domains" in caplog.text


def test_samples_are_readable(unseen):
    rows = suite(tools=unseen).samples(model())
    assert len(rows) == 6
    assert rows[0]["task"] == "addition_1"
    assert rows[0]["prompt"].endswith("=")


def test_a_better_model_gets_a_better_perplexity():
    flat = Transformer(TINY).initialize(0)
    for parameter in flat.parameters():
        parameter.data.mul_(0)
    assert suite()._perplexity(flat).value == pytest.approx(TINY.vocab_size, rel=1e-4)
    assert suite()._perplexity(model()).value > TINY.vocab_size
