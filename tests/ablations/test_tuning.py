"""Arms that go on from a checkpoint: what they learn from, and how their answers are compared."""

import json
from typing import Any

import pytest

from k2.ablations.answers import RATES, Answers, read_answers
from k2.ablations.comparison import compare_answers
from k2.ablations.page import files, rows
from k2.ablations.tuning import Tuning, covered
from k2.config.ablations import ArmConfig, StudyConfig
from k2.config.tune import TuneConfig
from k2.data.tokenizer import Tokenizer
from k2.evaluation.tasks import sample_mixture
from k2.model.transformer import Transformer
from k2.stages import tune
from k2.store.artifacts import Artifact
from pipelines.ablations.rl_vs_sft import STUDY
from tests.conftest import SilentProgress
from tests.rl import program

SFT = program.SFT.model_copy(update={"steps": 2})
RL = program.RL.model_copy(
    update={"general_share": 0.0, "ptx_coefficient": 0.0, "iterations": 2, "segment_tokens": None}
)
CONFIG = TuneConfig(sft=SFT, rl=RL, items=12, rejection_rounds=1, rejection_prompts=4, seed=1)


@pytest.mark.parametrize("method", ["sft", "rejection", "rl"])
def test_every_method_trains_and_answers_the_same_problems(method, make_artifact, stage_harness, tmp_path) -> None:
    program.write_model(tmp_path)
    base: Artifact = make_artifact(
        "pretrain", {str(p.relative_to(tmp_path)): p for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    )
    result = stage_harness(tune.run, CONFIG.model_copy(update={"method": method}), {"model": base})
    answers = read_answers(result.artifact)
    examples = [sample_mixture(RL.tasks, "eval", 1, index) for index in range(12)]
    assert answers.prompts == [example.messages[0]["content"] for example in examples]
    assert 0 < answers.covered.sum() < 12
    assert answers.rates() == result.metrics
    assert {"config.json", "tokenizer/tokenizer.json"} <= set(result.artifact.files)


def test_coverage_is_a_part_of_the_distribution_that_the_prompt_shows() -> None:
    examples = [sample_mixture({"addition_2": 1.0}, "train", 3, index) for index in range(300)]
    assert 0.35 < sum(covered(example, "1234") for example in examples) / 300 < 0.55
    dialogs = Tuning(CONFIG, _tokenizer(), SilentProgress()).demonstrations()
    assert len(dialogs) == SFT.demonstrations


def test_equal_answers_are_learned_from_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"rl": RL.model_copy(update={"samples": 6})})

    class Solved:
        def score(self, *_: object) -> float:
            return 1.0

    monkeypatch.setattr("k2.ablations.tuning.get_task", lambda _: Solved())
    dialogs = Tuning(config, _tokenizer(), SilentProgress()).verified(Transformer(program.SHAPE).initialize(4), 0)
    assert len({tuple(dialog.ids) for dialog in dialogs}) == len(dialogs)


def test_no_arm_but_supervision_sees_a_demonstration() -> None:
    for arm in STUDY.arms:
        config = TuneConfig.model_validate(arm.fields)
        assert (config.rl.ptx_coefficient, config.rl.general_share, config.items) == (0, 0, 5000)


def test_answers_are_paired_by_seed() -> None:
    study = StudyConfig(
        name="s", title="S", question="Q?", stage="tune", reference="a", seeds=(1, 2), curves=("pass_rates",),
        arms=(ArmConfig(name="a"), ArmConfig(name="b", after="a")),
        columns=("uncovered_greedy", "uncovered_greedy_difference"),
    )  # fmt: skip

    def answers(solved: int) -> Answers:
        passes = [1, 0, *[1] * solved, *[0] * (4 - solved)]
        return Answers.of({"prompts": ["p"] * 6, "covered": [1, 1, 0, 0, 0, 0], "sampled": [0] * 6, "greedy": passes})

    result = compare_answers(study, {"a.1": answers(0), "a.2": answers(2), "b.1": answers(1), "b.2": answers(4)})
    one, other = result["arms"]
    assert set(other["values"]) == {*RATES, *(f"{rate}_difference" for rate in RATES)}
    assert other["values"]["uncovered_greedy_difference"]["by_seed"] == [0.25, 0.5]
    assert one["values"]["covered_greedy"]["mean"] == 0.5
    assert [line[1] for line in rows(result)[1:]] == ["0.250 [-2.927, 3.427]", "0.625 [-4.140, 5.390]"]
    assert set(files(json.loads(json.dumps(result)))) == {"s.md", "s.html", "s.pass_rates.svg"}


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "pretrain"},
        {"arms": (ArmConfig(name="b", after="a"), ArmConfig(name="a"))},
    ],
)
def test_an_arm_goes_on_from_one_above(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"name": "s", "title": "S", "question": "Q?", "stage": "tune", "reference": "a"}
    arms = (ArmConfig(name="a"), ArmConfig(name="b", after="a"))
    StudyConfig(**fields, arms=arms)
    with pytest.raises(ValueError, match=r"b\.after"):
        StudyConfig(**{**fields, "arms": arms, **changes})


def _tokenizer() -> Tokenizer:
    return Tokenizer.train(["user assistant 0123456789"] * 3, 320, digits_per_token=1, special_slots=20)
