import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from kfp import compiler

from k2.config.ablation import RlVsSftConfig
from k2.data.tokenizer import Tokenizer
from k2.evaluation.harness import MODES
from k2.evaluation.tasks import sample_mixture
from k2.model.transformer import Transformer
from k2.monitoring.standalone import markdown_table
from k2.rl.ablation import ARMS, _Study, covered, run_component, run_seed
from k2.rl.ablation_report import cpu_rows, figure, page, rows, summarize
from k2.store.artifacts import Artifact
from pipelines.ablations.rl_vs_sft import CONFIG as CONFIG_OF_THE_STUDY
from pipelines.ablations.rl_vs_sft import rl_vs_sft
from tests.conftest import SilentProgress
from tests.rl import program

DOCS = Path(__file__).parents[2] / "docs"
SFT = program.SFT.model_copy(update={"steps": 2})
RL = program.RL.model_copy(
    update={"general_share": 0.0, "ptx_coefficient": 0.0, "iterations": 2, "segment_tokens": None}
)
CONFIG = RlVsSftConfig(
    items=12, plateau=SFT, more_sft=SFT, rl=RL, rejection=SFT, rejection_rounds=1, rejection_prompts=4
)


def test_the_pipeline_compiles(tmp_path: Path) -> None:
    compiler.Compiler().compile(rl_vs_sft, str(tmp_path / "study.yaml"))
    assert "study-seed" in (tmp_path / "study.yaml").read_text()


def test_a_seed_runs_all_arms_from_one_plateau_on_the_same_problems(make_artifact, tmp_path: Path) -> None:
    program.write_model(tmp_path)
    files = {str(path.relative_to(tmp_path)): path for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    artifact: Artifact = make_artifact("pretrain", files)
    results = [json.loads(run_component(CONFIG.model_dump_json(), artifact.uri, seed)) for seed in (1, 2)]
    for result in results:
        assert {len(result[arm][mode]) for arm in ("plateau", *ARMS) for mode in ("sampled", "greedy")} == {12}
        assert set(result["cpu_s"]) == {"plateau", *ARMS}
        assert any(result["covered"])
        assert not all(result["covered"])
    table = summarize(results)
    assert sum(table["items"][part]["answers"] for part in ("covered", "uncovered")) == 24
    assert table["cpu_spread"] >= 0
    assert table["cpu_s"]["rl"] == [result["cpu_s"]["rl"] for result in results]


def test_coverage_is_a_part_of_the_distribution_that_the_prompt_shows() -> None:
    examples = [sample_mixture({"addition_2": 1.0}, "train", 3, index) for index in range(300)]
    share = sum(covered(example, "1234") for example in examples) / 300
    assert 0.35 < share < 0.55


def result(rl: int, seed: int) -> dict[str, Any]:
    """Four answers, one problem drawn twice; RL is right as often as told where the others are wrong."""
    scores = {mode: [1, 0, 0, 1, 0] for mode in MODES}
    better = {mode: [1, rl, rl, 1, rl] for mode in MODES}
    return {
        "seed": seed,
        "prompts": ["10+10=", "11+11=", "11+11=", "50+50=", "51+51="],
        "covered": [True, True, True, False, False],
        "cpu_s": {"plateau": 5.0, "rl": 2.0, "sft": 2.2, "rejection": 2.0},
        **dict.fromkeys(("plateau", "sft", "rejection"), scores),
        "rl": better,
    }


def test_the_summary_pairs_items_and_keeps_parts_apart() -> None:
    table = summarize([result(1, 1), result(1, 2)])
    assert table["scores"]["covered"]["rl/greedy"]["mean"] == 1.0
    assert table["scores"]["uncovered"]["sft/greedy"]["mean"] == 0.5
    assert table["differences"]["covered"]["rl-sft/sampled"]["mean"] == pytest.approx(2 / 3)
    assert table["differences"]["covered"]["rl-sft/sampled"]["by_seed"] == pytest.approx([2 / 3, 2 / 3])
    assert table["items"]["covered"] == {"answers": 6, "distinct": 4}
    assert table["cpu_spread"] == pytest.approx(0.1)
    nothing = summarize([result(0, 1)])["differences"]["covered"]["rl-sft/greedy"]
    assert nothing == {"mean": 0.0, "low": 0.0, "high": 0.0, "by_seed": [0.0]}


def test_answers_to_one_problem_are_one_unit_and_seeds_count_as_they_differ() -> None:
    one = result(1, 1) | {"prompts": ["same"] * 5, "covered": [True] * 4 + [False]}
    assert summarize([one])["differences"]["covered"]["rl-sft/greedy"]["low"] == pytest.approx(0.5)
    unlike = summarize([one, one | {"rl": one["sft"]}])["differences"]["covered"]["rl-sft/greedy"]
    assert (unlike["low"], unlike["high"]) == pytest.approx((0.0, 0.5))


def test_the_page_is_self_contained_and_shows_every_number() -> None:
    table = summarize([result(1, 1), result(0, 2)])
    html = page(table)
    assert "<svg" in html
    assert all(cell in html for line in [*rows(table), *cpu_rows(table)] for cell in line)
    assert markdown_table(rows(table)).count("\n") == len(rows(table)) + 1
    assert ElementTree.fromstring(figure(table)).tag.endswith("svg")


def test_the_committed_study_is_valid_and_rl_sees_no_demonstration() -> None:
    config = RlVsSftConfig.model_validate_json(CONFIG_OF_THE_STUDY)
    assert config.items >= 5000
    assert (config.rl.ptx_coefficient, config.rl.general_share) == (0, 0)


def test_the_document_shows_the_committed_result() -> None:
    table = json.loads((DOCS / "rl-vs-sft.json").read_text())
    assert (DOCS / "rl-vs-sft.svg").read_text() == figure(table) + "\n"
    text = (DOCS / "rl-vs-sft.md").read_text()
    assert markdown_table(rows(table)) in text
    assert markdown_table(cpu_rows(table)) in text


def test_equal_answers_are_learned_from_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"rl": RL.model_copy(update={"samples": 6})})
    study = _Study(config, _tokenizer(), 1, SilentProgress())

    class Solved:
        def score(self, *_: object) -> float:
            return 1.0

    monkeypatch.setattr("k2.rl.ablation.get_task", lambda _: Solved())
    dialogs = study._verified(Transformer(program.SHAPE).initialize(4), 0)
    assert len({tuple(dialog.ids) for dialog in dialogs}) == len(dialogs)


def test_arms_start_from_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("supervise", "reinforce", "reject"):
        monkeypatch.setattr(_Study, name, lambda self, model, *_: seen.append(model.lm_head.weight.sum().item()))
    run_seed(CONFIG, Transformer(program.SHAPE).initialize(4), _tokenizer(), 1, SilentProgress())
    assert len(seen) == 4
    assert len(set(seen)) == 1


def _tokenizer() -> Tokenizer:
    return Tokenizer.train(["user assistant 0123456789"] * 3, 320, digits_per_token=1, special_slots=20)
