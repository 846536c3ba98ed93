"""The first step of scheduled runs, on a real store; and the guarded pipeline by kfp's local runner."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2.config.load import load_config
from k2.errors import UserError
from k2.execution.digest import artifact_key
from k2.execution.registry import STAGES
from k2.monitoring.run_record import month, read_run, write_stage_record
from k2.platform.guard import DAY_S, first_missing, guard_component, spending
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

CONFIG = load_config("nano", {"run": "scheduled"})
HOUR = 3600.0


@pytest.fixture(autouse=True)
def _known_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus of the environment, without looking at all of it."""
    monkeypatch.setattr("k2.data.snapshot.fingerprint", lambda config, store: "snapshot-1")


def publish(store: Store, stage: str, made: dict[str, Artifact], external: str | None) -> Artifact:
    """What the stage would have made, by its real key."""
    spec = STAGES[stage]
    inputs = {name: made[source] for name, source in spec.inputs.items()}
    key = artifact_key(spec, getattr(CONFIG, stage), inputs, external)
    with Lease(store, f"work/{key}/lease.json") as lease:
        writer = ArtifactWriter(store, stage, key, WorkArea(store, key, lease))
        writer.path("content").write_text(stage)
        try:
            return writer.publish()
        finally:
            writer.discard()


def test_there_is_something_new_until_every_stage_has_its_result(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Artifact] = {}
    for stage, spec in STAGES.items():
        if not spec.always:
            assert first_missing(CONFIG, store) == stage
            made[stage] = publish(store, stage, made, "snapshot-1" if stage == "corpus" else None)
    assert first_missing(CONFIG, store) is None
    text = CONFIG.model_dump_json()
    assert guard_component(text, True, 0.0, 30, "{}") == (
        False,
        "Nothing new: a result for this data, configuration and code exists.",
    )
    assert guard_component(text, False, 0.0, 30, "{}") == (True, "To make: everything.")
    other = load_config("nano", {"rl": {"seed": 99}})
    assert first_missing(other, store) == "rl"
    monkeypatch.setattr("k2.data.snapshot.fingerprint", lambda config, store: "snapshot-2")
    assert guard_component(text, True, 0.0, 30, "{}") == (True, "To make: corpus.")


def record(store: Store, run: str, stage: str, started: float, hours: float, **values: Any) -> None:
    """What a run leaves in the store, at another time than now."""
    with pytest.MonkeyPatch.context() as patch:
        for now, status in ((started, "running"), (started + hours * HOUR, "done")):
            patch.setattr("k2.monitoring.run_record.time.time", lambda now=now: now)
            write_stage_record(store, run, {"stage": stage, "status": status} | values)


def test_spending_counts_the_window_the_running_and_not_the_cached(store: Store) -> None:
    now = time.time()
    costs = {"pretrain": 10.0, "rl": 100.0}
    record(store, "old", "pretrain", now - 40 * DAY_S, 1.0)
    record(store, "old", "report", now - 39 * DAY_S, 0.0)
    record(store, "last", "pretrain", now - 5 * DAY_S, 2.0)
    record(store, "last", "rl", now - 5 * DAY_S, 1.0)
    record(store, "last", "ingest", now - 5 * DAY_S, 50.0)
    record(store, "last", "report", now - 4 * DAY_S, 0.0)
    record(store, "repeat", "rl", now - 3 * DAY_S, 1.0, cached=True)
    record(store, "repeat", "report", now - 3 * DAY_S, 0.0)
    record(store, "live", "pretrain", now - 0.5 * HOUR, 0.0, status="running")
    spent, last = spending(store, costs, now - 30 * DAY_S)
    assert spent == pytest.approx(20 + 100 + 5, abs=0.1)
    assert last == pytest.approx(120)
    assert spending(store, costs, 0.0)[0] == pytest.approx(135, abs=0.1)


def test_spending_reads_what_began_in_its_months_however_many_runs_there_are(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for number in range(20):
        record(store, f"long-ago-{number}", "rl", now - (200 + number) * DAY_S, 1.0)
    record(store, "recent", "rl", now - 40 * DAY_S, 20 * 24.0)
    record(store, "recent", "report", now - 20 * DAY_S, 0.0)
    record(store, "ended-early", "report", now - DAY_S, 0.0)
    listed, read = [], []
    plain_list, plain_get = store.list, store.get
    monkeypatch.setattr(store, "list", lambda prefix: listed.append(prefix) or plain_list(prefix))
    monkeypatch.setattr(store, "get", lambda name: read.append(name) or plain_get(name))
    spent, last = spending(store, {"rl": 1.0}, now - 30 * DAY_S)
    assert spent == pytest.approx(10 * 24.0, abs=0.1)
    assert last == pytest.approx(20 * 24.0)
    assert not [name for name in read if "long-ago" in name]
    assert set(listed) == {*(f"spending/{month(now - days * DAY_S)}/" for days in range(62)), "runs/recent/stages/"}


def test_a_budget_leaves_room_for_one_more_run(store: Store) -> None:
    record(store, "last", "rl", time.time() - DAY_S, 1.0)
    record(store, "last", "report", time.time() - DAY_S, 0.0)
    text = CONFIG.model_dump_json()
    proceed, reason = guard_component(text, False, 201.0, 30, '{"rl": 100.0}')
    assert proceed
    assert reason.endswith("Within budget: 100.00 spent in 30 days and 100.00 for one more run, of 201.00.")
    assert guard_component(text, False, 199.0, 30, '{"rl": 100.0}') == (
        False,
        "Over budget: 100.00 spent in 30 days and 100.00 for one more run, of 199.00.",
    )


def test_a_budget_without_prices_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no pool has a price"):
        spending(store, {}, 0.0)
    with pytest.raises(SystemExit) as end:
        guard_component(CONFIG.model_dump_json(), False, 1.0, 30, "{}")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: budget: no pool has a price")


@pytest.fixture
def retrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The guarded pipeline by kfp's local runner, in a deployment where an hour of RL costs 100."""
    from kfp import dsl, local

    from pipelines import retrain as module

    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root / 'src'}:{root}")
    monkeypatch.setattr(module, "stage_costs", lambda: '{"rl": 100.0}')

    def run(**parameters: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            priced: Callable[..., Any] = dsl.pipeline(name="k2-retrain")(module.retrain.pipeline_func)
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
            priced(preset="nano", run="scheduled", only_if_new=False, **parameters)

    return run


def test_a_refused_run_ends_green_with_a_report_and_without_work(
    store: Store, tmp_path: Path, retrain: Callable[..., None]
) -> None:
    record(store, "last", "rl", time.time() - DAY_S, 1.0)
    record(store, "last", "report", time.time() - DAY_S, 0.0)
    retrain(budget=150.0)
    assert [each["stage"] for each in read_run(store, "scheduled")] == ["report"]
    verdict = next((tmp_path / "kfp").rglob("verdict*"))
    assert "Over budget" in verdict.read_text()


def test_a_run_that_may_go_on_starts_the_recipe(store: Store, retrain: Callable[..., None]) -> None:
    """Its first stage is made to fail, which is quick and shows that it was reached."""
    with pytest.raises(RuntimeError):
        retrain(budget=150.0, overrides="corpus: {paths: [/nonexistent]}")
    states = {each["stage"]: each["status"] for each in read_run(store, "scheduled")}
    assert (states["corpus"], states["report"]) == ("failed", "done")
