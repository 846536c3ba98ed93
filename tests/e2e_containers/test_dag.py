"""The compiled pipeline in containers of the built image, by kfp's DockerRunner."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from k2.execution.registry import STAGES
from k2.monitoring.run_record import read_run
from k2.store.artifacts import open_uri
from k2.store.client import Store
from tests.e2e.conftest import Site
from tests.e2e_containers.compiled import Request
from tests.e2e_containers.conftest import NETWORK, Docker
from tests.manifests.render import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
PRESET = os.environ.get("K2_E2E_PRESET", "nano")


@pytest.fixture(scope="module")
def in_containers(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stage -> its record and digest, of a run in containers of the pipeline that `k2 pipeline compile` writes."""
    site = Site(tmp_path_factory.mktemp("site"))
    deployment = yaml.safe_load((ROOT / "pipelines" / "deployments" / "cpu.yaml").read_text())
    deployment["images"] = {"cpu": docker.image}
    (site.folder / "deployment.yaml").write_text(yaml.safe_dump(deployment))
    compiled = site.k2("pipeline", "compile", "--deployment", "deployment.yaml", "--pipeline", "k2")
    assert compiled.code == 0, compiled.err
    outputs = docker.folder / "outputs"
    outputs.mkdir(mode=0o777)
    outputs.chmod(0o777)
    parameters = {"preset": PRESET, "run": "e2e"}
    file = str(site.folder / "compiled" / "k2.yaml")
    request = Request(file, str(outputs), NETWORK, parameters, docker.store)
    environment = os.environ | {"DOCKER_HOST": docker.address}
    with (docker.folder / "kfp.log").open("w+") as log:
        command = [sys.executable, "-m", "tests.e2e_containers.compiled"]
        ended = subprocess.run(
            command, input=request.json(), text=True, stdout=log, stderr=log, env=environment, cwd=ROOT, check=False
        )
        log.seek(0)
        assert ended.returncode == 0, log.read()[-6000:]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in docker.store.items():
            patch.setenv(name, value)
        store = Store.from_environment()
        records = {each["stage"]: each for each in read_run(store, "e2e")}
        return {name: each | {"digest": open_uri(store, each["artifact"]).digest} for name, each in records.items()}


def test_every_step_is_done(in_containers: dict[str, Any]) -> None:
    assert {name: each["status"] for name, each in in_containers.items()} == dict.fromkeys(STAGES, "done")
    assert not any(each["cached"] for name, each in in_containers.items() if not STAGES[name].always)


PROCESSES = """
import json, subprocess, sys
def k2(*arguments):
    return json.loads(subprocess.run(["k2", *arguments, "--json"], check=True, stdout=subprocess.PIPE).stdout)
stages = k2("run", "--preset", sys.argv[1])["stages"]
print(json.dumps({name: k2("lineage", stage["artifact"])["digest"] for name, stage in stages.items()}))
"""


def test_containers_and_processes_make_the_same_artifacts(docker: Docker, in_containers: dict[str, Any]) -> None:
    """What a stage makes from its configuration and inputs alone; the corpus is of the image's own libraries."""
    processes = json.loads(docker.python(PROCESSES, PRESET, store={"K2_S3_PREFIX": "processes"}))
    names = [name for name, stage in STAGES.items() if not stage.always]
    assert {name: in_containers[name]["digest"] for name in names} == {name: processes[name] for name in names}


STARTS = """
import json, os, resource, subprocess, sys
from k2.execution.registry import STAGES
def seconds(code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
def best(code):
    return min(seconds(code) for _ in range(2))
torch, os.environ["_KFP_RUNTIME"] = best("import torch"), "true"
step = "import kfp.dsl.executor_main, k2.execution.component, "
print(json.dumps({name: best(step + STAGES[name].module) - torch for name in sys.argv[1:] or STAGES}))
"""


def test_a_step_works_three_seconds_after_its_start(docker: Docker) -> None:
    """Beyond torch's own import, started as Kubeflow does; in CPU time, for this machine may have other work."""
    found = json.loads(docker.python(STARTS, "ingest", "rephrase", "pretrain", "synthesize", "rl"))
    assert {stage: seconds for stage, seconds in found.items() if seconds > 3} == {}
