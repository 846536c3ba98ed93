"""From a study to the configuration of a training."""

from collections.abc import Callable

import pytest

from k2.ablations.arms import arm_config, best_candidate, study_config
from k2.errors import UserError
from k2.store.artifacts import Artifact
from pipelines.ablations.qk_clip import STUDY


def test_the_user_overrides_the_study_and_the_study_the_preset() -> None:
    assert study_config(STUDY, "tiny", {}).pretrain.lr == STUDY.settings["tiny"]["pretrain"]["lr"]
    config = study_config(STUDY, "tiny", {"pretrain": {"lr": 0.5}})
    assert (config.pretrain.lr, config.pretrain.model.num_attention_heads) == (0.5, 8)
    assert study_config(STUDY, "small", {}).pretrain.model.num_attention_heads != 8


def test_an_arm_changes_its_fields_only() -> None:
    shared = study_config(STUDY, "nano", {}).pretrain
    arm = arm_config(shared, {"optimizer": {"tau": 7.0}}, 5)
    assert arm.model_copy(update={"seed": shared.seed, "optimizer": shared.optimizer}) == shared
    assert (arm.seed, arm.optimizer.tau) == (5, 7.0)
    assert arm.optimizer.model_copy(update={"tau": shared.optimizer.tau}) == shared.optimizer


def test_a_field_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="tow"):
        arm_config(study_config(STUDY, "nano", {}).pretrain, {"optimizer": {"tow": 7.0}}, 5)


def test_the_lowest_mean_over_the_seeds_wins(make_artifact: Callable[..., Artifact]) -> None:
    def candidate(lr: float, loss: float) -> Artifact:
        artifact = make_artifact("pretrain", {}, heldout_loss=loss)
        provenance = {"config": {"lr": lr}}
        return Artifact(artifact.store, artifact.manifest.model_copy(update={"provenance": provenance}))

    candidates = [candidate(0.01, 4.0), candidate(0.02, 3.9), candidate(0.01, 3.7), candidate(0.02, 3.9)]
    assert best_candidate(candidates, "lr") == 0.01
