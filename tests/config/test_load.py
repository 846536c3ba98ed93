"""Configuration: presets, overrides, and errors that name the field and what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.config.base import Section, canonical_json, semantic_values, setting
from k2.config.load import load_config, merge_overrides, parse_document, preset_names, read_document, validate
from k2.config.render import render
from k2.errors import UserError


def test_every_preset_is_valid() -> None:
    assert {"nano", "tiny", "small", "moonlight-16b", "k2-1t"} <= set(preset_names())
    for name in preset_names():
        assert load_config(name).preset == name


def test_kimi_k2_is_kimi_k2() -> None:
    model = load_config("k2-1t").pretrain.model
    assert (model.num_hidden_layers, model.hidden_size, model.n_routed_experts) == (61, 7168, 384)


def test_overrides_are_typed_and_the_last_wins() -> None:
    document = merge_overrides({}, ["rl.seed=1", "pretrain.model.rms_norm_eps=3e-4", "rl.seed=2"])
    config = load_config("tiny", document)
    assert config.rl.seed == 2
    assert config.pretrain.model.rms_norm_eps == 3e-4


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"pretrain": {"sede": 1}}, r"pretrain\.sede: no such field; the fields are seed, "),
        ({"nonsense": 1}, r"nonsense: no such field; the fields are preset, run, corpus"),
        ({"pretrain": {"seed": -1}}, r"pretrain\.seed: must be at least 0, found -1"),
        (
            {"pretrain": {"model": {"hidden_size": "wide"}}},
            r"pretrain\.model\.hidden_size: must be a whole number, found 'wide'",
        ),
        ({"pretrain": {"model": {"rms_norm_eps": float("nan")}}}, r"pretrain\.model\.rms_norm_eps: .*finite"),
        ({"tokenize": {"vocab_size": 2048}}, r"pretrain\.model\.vocab_size \(1024\) must equal tokenize\.vocab_size"),
    ],
)
def test_errors_name_the_field_the_value_and_what_is_allowed(document: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("tiny", document)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"preset: 'huge' is unknown; choose one of .*tiny"):
        load_config("huge")


@pytest.mark.parametrize("override", ["rl.seed", "=3"])
def test_malformed_override(override: str) -> None:
    with pytest.raises(UserError, match=r"dotted\.path=value"):
        merge_overrides({}, [override])


def test_unreadable_documents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml"):
        read_document(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="expected fields"):
        read_document(tmp_path / "list.yaml")
    with pytest.raises(UserError, match="overrides: "):
        parse_document("{", "overrides")


@pytest.mark.parametrize("preset", ["nano", "tiny", "k2-1t"])
def test_the_json_that_crosses_kfp_means_the_same(preset: str) -> None:
    config = load_config(preset)
    crossed = json.loads(config.model_dump_json(), parse_int=float)
    assert validate(crossed) == config
    assert canonical_json(semantic_values(validate(crossed))) == canonical_json(semantic_values(config))


def test_rendered_configuration_is_yaml_with_a_comment_for_every_field() -> None:
    config = load_config("tiny")
    text = render(config)
    assert validate(parse_document(text, "rendered")) == config
    silent = [line for line in text.splitlines() if "#" not in line]
    assert silent == []


class Nested(Section):
    inner: float = setting(0.0, "a number")
    loud: bool = setting(False, "noise", semantic=False)


class Outer(Section):
    nested: Nested = setting(Nested(), "a block")
    many: tuple[Nested, ...] = setting((), "blocks")


@given(st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.integers(0, 3))
def test_noise_never_reaches_the_key(value: float, loud: bool, count: int) -> None:
    def text(flag: bool) -> str:
        one = Nested(inner=value, loud=flag)
        return canonical_json(semantic_values(Outer(nested=one, many=(one,) * count)))

    assert text(loud) == text(not loud)
    assert "loud" not in text(loud)
