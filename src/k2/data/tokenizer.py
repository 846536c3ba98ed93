"""Byte-level BPE with K2's pre-tokenisation pattern and special tokens, stored as a Hugging Face tokenizer."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

log = logging.getLogger(__name__)

# Where K2 puts each token inside its block of 256 ids after the BPE ranks (163,584 is [BOS]).
SPECIAL_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "[UNK]": -2,
    "[PAD]": -1,
}

_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def split_pattern(digits_per_token: int) -> str:
    """K2's pre-tokenisation pattern (`pat_str` of tokenization_kimi.py); K2 groups up to 3 digits."""
    return "|".join(
        [
            r"[\p{Han}]+",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
            rf"\p{{N}}{{1,{digits_per_token}}}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


class Tokenizer:
    """Text to token ids and back. Ordinary text never yields a special token, whatever it contains."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._text = _without_added_tokens(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.special: dict[str, int] = {name: vocabulary[name] for name in SPECIAL_OFFSETS}

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, digits_per_token: int = 3, special_slots: int = 256
    ) -> "Tokenizer":
        """Learn `vocab_size - special_slots` BPE tokens from `texts`; the special tokens take the last ids.

        The same texts in the same order give the same tokenizer. Where the texts hold too few pairs
        for the vocabulary, reserved tokens fill it, so that the size is always the one asked for.
        """
        base = vocab_size - special_slots
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split_pattern(digits_per_token)), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=base, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        _add_special_tokens(backend, vocab_size, special_slots)
        return cls(backend)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json` from a folder that `save` (or `save_pretrained`) wrote."""
        return cls(Backend.from_file(str(directory / "tokenizer.json")))

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, loadable by `PreTrainedTokenizerFast`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "[BOS]",
            "eos_token": "[EOS]",
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; text that spells a special token is encoded as ordinary characters."""
        ids: list[int] = self._text.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        return [encoding.ids for encoding in self._text.encode_batch_fast(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens spelled out; the inverse of `encode`."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


def _add_special_tokens(backend: Backend, vocab_size: int, special_slots: int) -> None:
    """Fill the ids from the last BPE token up to `vocab_size`; the unnamed become `<|reserved_token_{id}|>`."""
    first = vocab_size - special_slots
    learned = backend.get_vocab_size()
    if learned < first:
        log.warning("the texts yield %d BPE tokens of %d; reserved tokens fill the rest", learned, first)
    names = {first + offset % special_slots: name for name, offset in SPECIAL_OFFSETS.items()}
    for index in range(learned, vocab_size):
        name = names.get(index, f"<|reserved_token_{index}|>")
        # K2 leaves the tool-call tokens out of the "special" set, so that decoding for a parser keeps them.
        backend.add_tokens([AddedToken(name, special=not name.startswith("<|tool_call"), normalized=False)])


def _without_added_tokens(backend: Backend) -> Backend:
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = []
    return Backend.from_str(json.dumps(plain))
