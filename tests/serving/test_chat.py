"""The terminal chat, with a real (untrained) model and piped input."""

import io
from pathlib import Path

import pytest

from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.model import hf
from k2.model.generate import Engine
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer
from k2.serving.answer import AnswerText
from k2.serving.chat import ChatSettings, Conversation, chat, load_export, load_tokenizer
from k2.serving.chat_template import IM_END, encode_chat
from tests.serving.small import shape

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bf16")
    Tokenizer.train(["naïve café — hello world, how are you?"] * 5, 600).save(directory)
    config = shape(CONTEXT)
    hf.save(Transformer(config).initialize(0), config, directory)
    return directory


def conversation(folder: Path, **settings: float | str) -> Conversation:
    return Conversation(Engine(load_export(folder)), load_tokenizer(folder), ChatSettings(**settings))  # type: ignore[arg-type]


def run(folder: Path, text: str, **settings: float) -> str:
    out = io.StringIO()
    chat(folder, source=io.StringIO(text), stream=out, settings=ChatSettings(**settings))  # type: ignore[arg-type]
    return out.getvalue()


def test_the_streamed_answer_is_the_engines_answer(folder: Path) -> None:
    pieces: list[str] = []
    talk = conversation(folder, max_tokens=24, temperature=0.0)
    talk.say("hello", pieces.append)
    tokenizer, engine = load_tokenizer(folder), Engine(load_export(folder))
    messages = [{"role": "user", "content": "hello"}]
    prompt = encode_chat(tokenizer, messages, add_generation_prompt=True, default_system=None).ids
    stop = (tokenizer.special[IM_END], tokenizer.special["[EOS]"])
    sample = engine.generate([prompt], 1, SamplingConfig(24, 0.0, stop_ids=stop))[0][0]
    expected = tokenizer.decode([token for token in sample.token_ids if token not in stop])
    assert "".join(pieces) == expected
    assert len(pieces) > 3
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_the_same_input_gives_the_same_output_and_turns_remember(folder: Path) -> None:
    once, twice = (run(folder, "hello\nand you?\n", max_tokens=12, temperature=1.0, seed=3) for _ in range(2))
    assert once == twice
    alone = run(folder, "hello\n/reset\nhello\n", max_tokens=12, temperature=1.0, seed=3)
    first, rest = alone.split("(a new conversation)\n")
    assert first == rest != ""


def test_reset_quit_help_and_blank_lines(folder: Path) -> None:
    out = run(folder, "\n   \n/what\n/quit\nhello\n", max_tokens=4)
    assert out.count("/reset starts") == 1
    assert out.endswith(")\n")


def test_a_full_context_loses_its_oldest_turns_and_a_message_that_is_too_long_is_refused(folder: Path) -> None:
    talk = conversation(folder, max_tokens=2, temperature=1.0)
    for _ in range(12):
        talk.say("how are you?", lambda piece: None)
    assert talk.messages[0]["role"] == "user"
    assert 2 < len(talk.messages) < 24
    kept = list(talk.messages)
    with pytest.raises(UserError, match="64 fit before an answer"):
        conversation(folder, max_tokens=500).say("z" * 500, lambda piece: None)
    with pytest.raises(UserError):
        talk.say("z" * 500, lambda piece: None)
    assert talk.messages == kept
    assert "96 fit" in run(folder, "z" * 500 + "\n", max_tokens=32)


def test_ctrl_c_stops_the_answer_and_not_the_chat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = AnswerText.add

    def interrupt(self: AnswerText, token: int) -> str:
        if len(self.text) > 3:
            raise KeyboardInterrupt
        return add(self, token)

    monkeypatch.setattr(AnswerText, "add", interrupt)
    out = run(folder, "hello\nworld\n", max_tokens=30)
    assert out.count("(stopped)") == 2


def test_ctrl_c_at_the_prompt_ends_quietly(folder: Path) -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int = -1, /) -> str:
            raise KeyboardInterrupt

    chat(folder, source=Interrupted(), stream=io.StringIO())


def test_a_folder_without_a_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        chat(tmp_path, source=io.StringIO(""), stream=io.StringIO())
