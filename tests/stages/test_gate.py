"""Gate and its decision on a real store."""

import json

import pytest

from k2.config.gate import GateConfig
from k2.evaluation.gate import Score, dump_scores
from k2.stages.gate import run
from k2.store.aliases import move_alias, read_alias

RULE = GateConfig(primary="sum/greedy")


@pytest.fixture
def evaluated(make_artifact):
    """`evaluated(name, value)` -> the gate's inputs for an export with that content and score."""

    def make(name: str, value: float):
        export = make_artifact("export", {"int4/config.json": name.encode()})
        score = Score(value=value, low=value - 0.02, high=value + 0.02, n=1000, protocol="p")
        document = {"final": "int4", "models": {"int4": dump_scores({"sum/greedy": score})}}
        evaluation = make_artifact("evaluate", {"evaluation.json": json.dumps(document).encode()})
        return {"evaluation": evaluation, "export": export}

    return make


def test_first_better_worse_and_again(stage_harness, evaluated, store):
    first, better, worse = evaluated("a", 0.5), evaluated("b", 0.6), evaluated("c", 0.55)

    result = stage_harness(run, RULE, first)
    assert result.metrics["changed"] is True
    assert result.artifact.statistics == result.metrics
    move_alias(store, read_alias(store, "champion"), first["export"])

    again = stage_harness(run, RULE, first)
    assert again.metrics == {
        "changed": False,
        "promote": False,
        "reasons": ["the candidate is the champion already"],
    }

    result = stage_harness(run, RULE, better)
    assert result.metrics["promote"] is True
    decision = result.artifact.json("decision.json")
    assert decision["champion"]["digest"] == first["export"].digest
    assert decision["champion"]["scores"]["sum/greedy"]["value"] == 0.5
    move_alias(store, read_alias(store, "champion"), better["export"])

    result = stage_harness(run, RULE, worse)
    assert result.metrics["changed"] is False
    assert read_alias(store, "champion").uri == better["export"].uri


def test_a_champion_that_was_rolled_back_by_hand_still_has_its_scores(stage_harness, evaluated, store):
    first, second = evaluated("a", 0.5), evaluated("b", 0.8)
    for candidate in (first, second):
        stage_harness(run, RULE, candidate)
        move_alias(store, read_alias(store, "champion"), candidate["export"])
    move_alias(store, read_alias(store, "champion"), first["export"])
    result = stage_harness(run, RULE, second)
    assert result.metrics["promote"] is True
    assert result.artifact.json("decision.json")["champion"]["scores"]["sum/greedy"]["value"] == 0.5


def test_aliases_are_separate(stage_harness, evaluated, store):
    first = evaluated("a", 0.9)
    stage_harness(run, RULE, first)
    move_alias(store, read_alias(store, "champion"), first["export"])
    other = RULE.model_copy(update={"alias": "staging"})
    assert stage_harness(run, other, evaluated("b", 0.1)).metrics["promote"] is True
