"""The tokenizer is lossless, deterministic, laid out like K2's, and the same one when transformers loads it."""

import hashlib
from pathlib import Path

import pytest
import regex
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from k2.data.tokenizer import SPECIAL_OFFSETS, Tokenizer, split_pattern

LINES = [f"The {i}th line isn't like the {i * 7919} others; def f_{i}(x): return x**{i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(LINES, 400, digits_per_token=1, special_slots=20)


@given(st.text())
def test_round_trip_of_any_unicode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.sampled_from([*SPECIAL_OFFSETS, "a", " ", "1", "é"])).map("".join))
def test_text_never_becomes_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(LINES) == [tokenizer.encode(line) for line in LINES]


@pytest.mark.parametrize("width", [1, 3])
def test_digits_are_grouped_as_asked(width):
    tokenizer = Tokenizer.train(["123456 123456 123 " * 50], 300, digits_per_token=width, special_slots=20)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("123456")]
    assert pieces == (list("123456") if width == 1 else ["123", "456"])


def test_special_tokens_take_k2s_places():
    tokenizer = Tokenizer.train(LINES, 512 + 256)
    first = 512
    assert tokenizer.vocab_size == 768
    assert {name: token - first for name, token in tokenizer.special.items()} == {
        name: offset % 256 for name, offset in SPECIAL_OFFSETS.items()
    }
    assert tokenizer.decode([first + 5]) == f"<|reserved_token_{first + 5}|>"


def test_poor_text_still_fills_the_vocabulary(caplog):
    tokenizer = Tokenizer.train(["ab"], 1024, special_slots=20)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.special["[PAD]"] == 1023
    assert "reserved tokens fill the rest" in caplog.text


def test_training_is_deterministic(tmp_path, tokenizer):
    digests = set()
    for name in "ab":
        Tokenizer.train(iter(LINES), 400, digits_per_token=1, special_slots=20).save(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).hexdigest())
    assert len(digests) == 1


@given(st.text())
def test_transformers_agrees(loaded, text):
    """On text that spells no special token: transformers reads those, where `encode` never does."""
    ours, theirs = loaded
    assume(not any(name in text for name in theirs.get_added_vocab()))
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


def test_transformers_knows_the_special_tokens(loaded):
    ours, theirs = loaded
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    assert len(theirs) == ours.vocab_size
    for name, token in ours.special.items():
        assert theirs.encode(name, add_special_tokens=False) == [token]
    assert theirs.decode(
        [ours.special["<|im_end|>"], ours.special["<|tool_call_begin|>"]], skip_special_tokens=True
    ) == ("<|tool_call_begin|>")


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("width", [1, 3])
@given(text=st.text(alphabet=st.sampled_from("aZé中ʰ1२ .,'sSt\n\r\t_(Dž")))
def test_pieces_are_those_of_the_pattern(width, text):
    """Against the `regex` module in its set-operation mode, which reads K2's pattern as published."""
    published = regex.compile(split_pattern(width), regex.V1)
    splitter = pre_tokenizers.Split(Regex(split_pattern(width)), "isolated")
    pieces = [text[slice(*span)] for _, span in splitter.pre_tokenize_str(text)]
    assert pieces == [match.group() for match in published.finditer(text)]
