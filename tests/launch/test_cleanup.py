"""The exit handler deletes the jobs of its run that still work or wait, and writes its report whatever happens."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2.config.deployment import Deployment
from k2.execution.component import run_report
from k2.launch.cluster import Cluster
from k2.launch.launcher import Launcher, delete_live_jobs
from k2.launch.work import Work
from k2.store.client import Store
from tests.conftest import SilentProgress
from tests.launch.conftest import DEPLOYMENT, placement
from tests.launch.fake_kubernetes import FakeKubernetes
from tests.launch.test_launcher import JOBS, TRAIN_JOBS, owned, owner_of_run

__all__ = ["owned"]


@pytest.fixture
def jobs(
    kubernetes: FakeKubernetes, cluster: Cluster, store: Store, progress: SilentProgress, owned: Callable[[str], None]
) -> FakeKubernetes:
    """Two jobs of the workflow `mine`, one of them complete, and one of `theirs` under the same name of a run."""
    owned("theirs")
    owned("mine")
    for name, stage, pool, workflow in (
        ("live", "tokenize", "job", "mine"),
        ("done", "ingest", "job", "mine"),
        ("gang", "pretrain", "gpus", "mine"),
        ("other", "sft", "job", "theirs"),
    ):
        work = Work(run="night", stage=stage, config={}, inputs={}, key="0" * 64)
        body = Launcher(cluster, placement(stage, pool), store, progress)._job(
            work, 1, owner_of_run(kubernetes, workflow)
        )
        body["metadata"] |= {"name": name, "ownerReferences": [owner_of_run(kubernetes, workflow)]}
        kubernetes.add(TRAIN_JOBS if pool == "gpus" else JOBS, body)
    kubernetes.status("done", conditions=[{"type": "Complete", "status": "True"}])
    return kubernetes


def names(kubernetes: FakeKubernetes) -> list[str]:
    return [body["metadata"]["name"] for kind in ("jobs", "trainjobs") for body in kubernetes.of(kind)]


def test_live_jobs_of_this_workflow_are_deleted(jobs: FakeKubernetes, cluster: Cluster) -> None:
    assert delete_live_jobs(cluster, "night", ["job", "trainjob"]) == ["live", "gang"]
    assert names(jobs) == ["done", "other"]
    assert delete_live_jobs(cluster, "night", ["job", "trainjob"]) == []


def report(folder: Path) -> None:
    page, metrics = SimpleNamespace(path=str(folder / "page")), SimpleNamespace(metadata={}, log_metric=lambda *_: None)
    run_report("nano", "night", "FAILED", page, metrics)


@pytest.fixture
def exit_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of the exit handler's pod."""
    monkeypatch.setenv("K2_JOBS", ",".join(Deployment.model_validate(DEPLOYMENT).job_kinds()))
    (tmp_path / "namespace").write_text("ml")
    monkeypatch.setattr("k2.launch.cluster.NAMESPACE_FILE", tmp_path / "namespace")


@pytest.mark.usefixtures("exit_task")
def test_the_exit_handler_cleans_up(jobs: FakeKubernetes, tmp_path: Path) -> None:
    report(tmp_path)
    assert names(jobs) == ["done", "other", "gang"]  # No stage of this deployment is a TrainJob.
    assert (tmp_path / "page").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("exit_task")
def test_a_cluster_that_does_not_answer_costs_no_report(
    jobs: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    jobs.forbidden.add("jobs")
    report(tmp_path)
    assert "jobs of night are left to their deadlines" in caplog.text
    assert (tmp_path / "page").exists()
