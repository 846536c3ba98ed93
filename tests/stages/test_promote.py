"""The alias moves once, only when decided, and never over somebody else's move."""

import json

import pytest

from k2.config.promote import PromoteConfig
from k2.errors import StageError
from k2.stages import promote
from k2.stages.promote import run
from k2.store.aliases import move_alias, read_alias


@pytest.fixture
def export(make_artifact):
    return lambda content: make_artifact("export", {"int4/config.json": content.encode()})


@pytest.fixture
def decided(make_artifact):
    """`decided(candidate, champion, promote)` -> the stage's inputs."""

    def make(candidate, champion=None, promote=True):
        side = None if champion is None else {"uri": champion.uri, "digest": champion.digest}
        document = {"alias": "champion", "promote": promote, "champion": side}
        decision = make_artifact("gate", {"decision.json": json.dumps(document).encode()})
        return {"decision": decision, "export": candidate}

    return make


def test_moves_once_and_then_reports_no_change(stage_harness, export, decided, store):
    first = export("a")
    inputs = decided(first)
    result = stage_harness(run, PromoteConfig(), inputs)
    assert result.metrics == {"changed": True, "alias": "champion", "champion": first.uri}
    assert result.artifact.statistics == result.metrics
    assert stage_harness(run, PromoteConfig(), inputs).metrics["changed"] is False
    assert read_alias(store, "champion").uri == first.uri


def test_a_refused_candidate_leaves_the_champion(stage_harness, export, decided, store):
    first, second = export("a"), export("b")
    stage_harness(run, PromoteConfig(), decided(first))
    result = stage_harness(run, PromoteConfig(), decided(second, first, promote=False))
    assert result.metrics == {"changed": False, "alias": "champion", "champion": first.uri}


def test_disabled_moves_nothing(stage_harness, export, decided, store):
    result = stage_harness(run, PromoteConfig(enabled=False), decided(export("a")))
    assert result.metrics["changed"] is False
    assert read_alias(store, "champion").uri is None


def test_an_alias_that_moved_since_the_gate_is_not_moved(stage_harness, export, decided, store):
    first, rival, second = export("a"), export("rival"), export("b")
    stage_harness(run, PromoteConfig(), decided(first))
    late = decided(second, first)
    stage_harness(run, PromoteConfig(), decided(rival, first))
    with pytest.raises(StageError, match=r"another run moved it.*run again"):
        stage_harness(run, PromoteConfig(), late)
    assert read_alias(store, "champion").uri == rival.uri


def test_a_race_within_the_stage_is_lost_cleanly(stage_harness, export, decided, store, monkeypatch):
    first, rival = export("a"), export("rival")

    def read_then_lose(store, name):
        alias = read_alias(store, name)
        move_alias(store, alias, rival)
        return alias

    monkeypatch.setattr(promote, "read_alias", read_then_lose)
    with pytest.raises(StageError, match="another run moved it"):
        stage_harness(run, PromoteConfig(), decided(first))
    assert read_alias(store, "champion").uri == rival.uri
