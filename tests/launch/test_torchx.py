"""`torchx run` with K2's schedulers, which it finds by itself, and with its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx.runner import Runner, get_runner
from torchx.specs import AppDef, AppState, Resource, Role

from k2.cli import main
from k2.launch.app import stage
from k2.launch.backend import Terms
from k2.launch.indexed_job import IndexedJob
from k2.store.artifacts import Artifact
from k2.store.client import Store
from tests.launch.conftest import DEPLOYMENT
from tests.launch.fake_kubernetes import FakeKubernetes, Kubelet
from tests.launch.test_launcher import wait_for
from tests.stages.test_pretrain import tokenized

ROOT = Path(__file__).parents[2]
FEW = ("pretrain.stable_tokens=4096", "pretrain.decay_tokens=2048")


def torchx(*arguments: str, **environment: str) -> str:
    """What the command prints."""
    run = subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_a_stage_of_two_processes_runs_here(
    store: Store, make_artifact: Callable[..., Artifact], tmp_path: Path
) -> None:
    tokens = tokenized(make_artifact, tmp_path, 40_000, 5_000)
    # torchx refuses an option that comes twice, unless it is one word with its value.
    settings = [f"--set={setting}" for setting in FEW]
    work = ["pretrain", "--preset", "nano", "--input", f"tokens={tokens.uri}", *settings]
    application = ["k2.launch.app.stage", "--processes", "2", "--", *work]
    output = torchx("run", "--workspace=", "--wait", "-s", "local_cwd", *application)
    assert "SUCCEEDED" in output
    (manifest,) = [info.name for info in store.list("pretrain/") if info.name.endswith("manifest.json")]
    body = store.get(manifest)
    assert body is not None
    assert json.loads(body)["statistics"]["tokens"] > 0


@pytest.mark.parametrize("source", [{}, {"TORCHX_PLUGINS_SOURCE": "1"}], ids=["default", "namespace only"])
def test_a_dry_run_needs_no_cluster(source: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(DEPLOYMENT | {"stages": {"pretrain": "gpus"}}))
    application = ["k2.launch.app.stage", "--deployment", str(file), "--", "pretrain", "--preset", "nano"]
    options = "namespace=ml,queue=k2-gpu,runtime=k2-torch-gpu"
    output = torchx("run", "--dryrun", "--workspace=", "-s", "trainjob", "-cfg", options, *application, **source)
    assert "conflict" not in output.lower()
    body = next(yaml.safe_load_all(output[output.index("apiVersion") :].partition("\n\n")[0]))
    assert body["kind"] == "TrainJob"
    assert body["spec"]["suspend"] is True
    assert body["spec"]["runtimeRef"]["name"] == "k2-torch-gpu"
    assert body["spec"]["trainer"]["numNodes"] == 2
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "k2-gpu"
    assert body["metadata"]["labels"]["k2.dev/preset"] == "nano"


@pytest.mark.parametrize(
    ("named", "preset"), [([], None), (["--preset", "nano"], "nano"), (["--preset=k2-1t"], "k2-1t")]
)
def test_pods_of_an_application_say_their_preset(named: list[str], preset: str | None, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(DEPLOYMENT))
    (default,) = [each.default for each in main.commands["tokenize"].params if each.name == "preset"]
    app = stage("tokenize", *named, "--set=seed=1", deployment=str(file))
    job = IndexedJob().job(app, Terms("ml"))
    for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
        assert labels["k2.dev/preset"] == (preset or default)


@pytest.fixture
def runner(kubernetes: FakeKubernetes) -> Iterator[Runner]:
    """torchx, and a cluster that runs pods."""
    kubernetes.kubelet = Kubelet()
    with get_runner() as made:
        yield made


def hello(*arguments: str) -> AppDef:
    role = Role("node", "python", entrypoint="python", args=list(arguments), resource=Resource(cpu=1, gpu=0, memMB=64))
    return AppDef("hello", [role])


def test_an_application_is_submitted_followed_and_read(runner: Runner, kubernetes: FakeKubernetes) -> None:
    handle = runner.run(hello("-c", "print('one'); print('two')"), "indexed_job", {"namespace": "ml"})
    status = runner.wait(handle, wait_interval=0.1)
    assert status is not None
    assert status.state is AppState.SUCCEEDED
    assert list(runner.log_lines(handle, "node", should_tail=True)) == ["one\n", "two\n"]
    assert list(runner.log_lines(handle, "node", regex="tw")) == ["two\n"]
    (listed,) = runner.list("indexed_job", {"namespace": "ml"})
    assert listed.app_handle == handle
    runner.delete(handle)
    assert kubernetes.of("jobs") == []
    assert runner.status(handle) is None


def test_an_application_is_cancelled(runner: Runner, kubernetes: FakeKubernetes) -> None:
    handle = runner.run(hello("-c", "import time; time.sleep(600)"), "indexed_job", {"namespace": "ml"})
    wait_for(lambda: kubernetes.of("pods"))
    described: Any = runner.describe(handle)
    assert described.roles[0].num_replicas == 1
    runner.cancel(handle)
    assert kubernetes.of("jobs") == kubernetes.of("pods") == []
