import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2.data.loader import IGNORE
from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.evaluation.tasks import prompt_split, sample_mixture
from k2.rl.demonstrations import DemonstrationSource, encode_solution, task_demonstrations, trajectory_demonstrations
from k2.rl.prompts import opening_requests
from k2.serving.chat_template import EncodedChat

PAD = 99


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["user assistant 0123456789"] * 3, 320, digits_per_token=1, special_slots=20)


def dialog(number: int, length: int) -> EncodedChat:
    return EncodedChat([number] * length, [False] + [True] * (length - 1))


@given(st.lists(st.integers(2, 12), min_size=1, max_size=30), st.integers(0, 5))
def test_an_epoch_holds_every_dialog_once_whole_and_in_one_row(lengths: list[int], seed: int) -> None:
    dialogs = [dialog(number + 1, length) for number, length in enumerate(lengths)]
    source = DemonstrationSource(dialogs, rows=1, length=11, micro_rows=1, pad=PAD, seed=seed)
    seen: list[tuple[int, int]] = []
    while len(seen) < len(lengths):
        (batch,) = source.next_step()
        for document in range(int(batch.documents_BL.max()) + 1):
            inside = batch.documents_BL == document
            (number,) = set(batch.tokens_BL[inside].tolist())
            assert set(batch.targets_BL[inside].tolist()) == {number}
            seen.append((number, int(inside.sum()) + 1))
        assert (batch.targets_BL[batch.tokens_BL == PAD] == IGNORE).all()
        assert (batch.documents_BL[batch.tokens_BL == PAD] == -1).all()
    assert sorted(seen[: len(lengths)]) == [(number + 1, length) for number, length in enumerate(lengths)]


def test_only_what_the_assistant_says_is_learnt(tokenizer: Tokenizer) -> None:
    example = sample_mixture({"addition_2": 1.0}, "train", 1, 0)
    chat = encode_solution(tokenizer, example)
    (batch,) = DemonstrationSource([chat], 1, len(chat.ids) - 1, 1, PAD, 0).next_step()
    learnt = batch.targets_BL[batch.targets_BL != IGNORE].tolist()
    assert tokenizer.decode(learnt) == example.answer["content"] + "<|im_end|>"


def test_demonstrations_are_fixed_and_on_the_training_side(tokenizer: Tokenizer) -> None:
    first = task_demonstrations(tokenizer, {"addition_2": 1.0}, 20, 5)
    assert first == task_demonstrations(tokenizer, {"addition_2": 1.0}, 20, 5)
    assert {prompt_split(sample_mixture({"addition_2": 1.0}, "train", 5, i)) for i in range(20)} == {"train"}


def test_a_restored_source_continues_exactly() -> None:
    def make() -> DemonstrationSource:
        return DemonstrationSource([dialog(n, 2 + n % 4) for n in range(1, 14)], 2, 8, 2, PAD, 7)

    source, other = make(), make()
    for _ in range(5):
        source.next_step()
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    for _ in range(6):
        (a,), (b,) = source.next_step(), other.next_step()
        assert torch.equal(a.tokens_BL, b.tokens_BL)
        assert torch.equal(a.targets_BL, b.targets_BL)


def test_dialogs_that_are_too_long_are_counted_and_none_left_is_a_user_error() -> None:
    source = DemonstrationSource([dialog(1, 5), dialog(2, 50)], 1, 8, 1, PAD, 0)
    assert (len(source.dialogs), source.dropped) == (1, 1)
    with pytest.raises(UserError, match="none of 1 dialogs fits into context_length 8"):
        DemonstrationSource([dialog(2, 50)], 1, 8, 1, PAD, 0)


def test_trajectories_become_dialogs_and_their_openings_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "12"},
        {"role": "assistant", "content": "34"},
        {"role": "user", "content": "56"},
        {"role": "assistant", "content": "78"},
    ]
    path = tmp_path / "trajectories.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": messages, "tools": []}) + "\n")
    (chat,) = trajectory_demonstrations(tokenizer, path)
    said = tokenizer.decode([token for token, mine in zip(chat.ids, chat.assistant_mask, strict=True) if mine])
    assert said == "34<|im_end|>78<|im_end|>"
    assert opening_requests(path) == [messages[:2]]
