from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import MixtureResult
from k2.execution.contract import Progress
from k2.model import hf
from k2.rl.demonstrations import task_demonstrations
from k2.rl.sft import accurate_enough, demonstration_source, fine_tune
from k2.training.state import TrainState
from tests.rl import program

Train = Callable[[Callable[[], bool]], TrainState]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    program.write_model(tmp_path)
    return tmp_path


@pytest.fixture
def train(folder: Path, progress: Progress) -> Train:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    dialogs = task_demonstrations(tokenizer, program.SFT.tasks, 8, 0)

    def tune(enough: Callable[[], bool]) -> TrainState:
        source = demonstration_source(program.SFT, tokenizer, dialogs)
        return fine_tune(program.SFT, hf.load(folder), source, None, progress, enough)

    return tune


def test_training_ends_where_it_is_good_enough(train: Train) -> None:
    answers = iter([False, True])
    assert train(lambda: next(answers)).step == 2 * program.SFT.validation_steps


def test_training_that_is_never_good_enough_makes_all_steps_and_is_asked_after_each_round(train: Train) -> None:
    asked = []
    assert train(lambda: bool(asked.append(1))).step == program.SFT.steps
    assert len(asked) == 3  # after 3, 6 and all 7 steps


@pytest.mark.parametrize(("accuracy", "reached"), [(0.89, False), (0.9, True)])
def test_the_target_is_measured_on_other_items_than_the_result(
    folder: Path, progress: Progress, monkeypatch: pytest.MonkeyPatch, accuracy: float, reached: bool
) -> None:
    seeds = []

    def evaluate(*arguments: Any) -> MixtureResult:
        seeds.append(arguments[5])
        return MixtureResult([], [], [index < 100 * accuracy for index in range(100)])

    monkeypatch.setattr("k2.rl.sft.evaluate_mixture", evaluate)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert accurate_enough(program.SFT, hf.load(folder), tokenizer, progress)() is reached
    assert seeds == [program.SFT.seed + 1]


def test_without_a_target_nothing_is_measured(folder: Path, progress: Progress) -> None:
    config = program.SFT.model_copy(update={"target_accuracy": None})
    assert not accurate_enough(config, hf.load(folder), Tokenizer.load(folder / "tokenizer"), progress)()
