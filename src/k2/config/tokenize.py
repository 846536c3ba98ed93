"""The tokenizer."""

from typing import Self

from pydantic import model_validator

from k2.config.base import StageSection, setting

BYTE_TOKENS = 256
CHAT_TEXTS = (
    "system\nuser\nassistant\ntool\ntool_declare\nfunctions\n",
    "You are Kimi, an AI assistant created by Moonshot AI.",
    "## Return of functions.search:0\n",
    "functions.get_weather:0 functions.create_order:1",
    '[{"type":"function","function":{"name":"search","description":"","parameters":{"type":"object","properties":'
    '{"query":{"type":"string","description":""}},"required":["query"]}}}]',
    '{"query":"","limit":10,"values":[1,2,3],"ok":true,"error":null}',
)


class TokenizeConfig(StageSection):
    """The `tokenize` stage."""

    vocab_size: int = setting(163_840, "entries of the vocabulary, special tokens included", ge=512)
    special_slots: int = setting(256, "ids at the end of the vocabulary reserved for special tokens", ge=20)
    digits_per_token: int = setting(3, "longest run of digits in one token", ge=1)
    train_bytes: int = setting(4_000_000_000, "stop training the tokenizer after this many bytes, seeded choice", gt=0)
    chat_texts: tuple[str, ...] = setting(CHAT_TEXTS, "texts of the chat template that the tokenizer also learns from")
    chat_repeats: int = setting(1000, "how often it sees each of them", ge=0)
    shard_tokens: int = setting(2**28, "tokens of a shard at most; training shuffles documents within one", gt=0)

    @model_validator(mode="after")
    def _bytes_fit(self) -> Self:
        if self.vocab_size < BYTE_TOKENS + self.special_slots:
            raise ValueError(f"vocab_size must be at least {BYTE_TOKENS} bytes + special_slots {self.special_slots}")
        return self
