import json
from pathlib import Path

import pytest
from kfp import compiler

from k2.config.ablation import RlVsSftConfig
from k2.evaluation.tasks import sample_mixture
from k2.model.transformer import Transformer
from k2.rl.ablation import ARMS, covered, run_component, run_seed, summarize
from k2.store.artifacts import Artifact
from pipelines.ablations.rl_vs_sft import rl_vs_sft
from tests.conftest import SilentProgress
from tests.rl import program

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
        assert set(result["cpu_s"]) == set(ARMS)
        assert any(result["covered"])
        assert not all(result["covered"])
    table = summarize(results)
    counts = [table["scores"][part]["rl/greedy"]["n"] for part in ("covered", "uncovered")]
    assert sum(counts) == 24
    assert table["cpu_spread"] >= 0


def test_coverage_is_a_part_of_the_distribution_that_the_prompt_shows() -> None:
    examples = [sample_mixture({"addition_2": 1.0}, "train", 3, index) for index in range(300)]
    share = sum(covered(example, "1234") for example in examples) / 300
    assert 0.35 < share < 0.55


def test_the_summary_pairs_items_and_keeps_parts_apart() -> None:
    def result(rl: int, seed: int) -> dict[str, object]:
        scores = {mode: [1, 0, 1, 0] for mode in ("sampled", "greedy")}
        better = {mode: [1, rl, 1, rl] for mode in ("sampled", "greedy")}
        arms = {"plateau": scores, "sft": scores, "rejection": scores, "rl": better}
        return {"seed": seed, "covered": [True, True, False, False], "cpu_s": dict.fromkeys(ARMS, 2.0), **arms}

    table = summarize([result(1, 1), result(1, 2)])
    assert table["scores"]["covered"]["rl/greedy"]["accuracy"] == 1.0
    assert table["scores"]["uncovered"]["sft/greedy"]["accuracy"] == 0.5
    assert table["rl_minus"]["covered"]["sft/sampled"]["mean"] == 0.5
    assert table["cpu_spread"] == pytest.approx(0)
    assert summarize([result(0, 1)])["rl_minus"]["covered"]["sft/greedy"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_arms_start_from_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import k2.rl.ablation as ablation

    seen = []
    for name in ("supervise", "reinforce", "reject"):
        monkeypatch.setattr(
            ablation._Study, name, lambda self, model, *_: seen.append(model.lm_head.weight.sum().item())
        )
    run_seed(CONFIG, Transformer(program.SHAPE).initialize(4), _tokenizer(), 1, SilentProgress())
    assert len(seen) == 4
    assert len(set(seen)) == 1


def _tokenizer():
    from k2.data.tokenizer import Tokenizer

    return Tokenizer.train(["user assistant 0123456789"] * 3, 320, digits_per_token=1, special_slots=20)
