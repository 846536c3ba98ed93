"""One application, four schedulers: what each makes of it is valid, restricted, and runs the same command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from torchx.schedulers.kubernetes_scheduler import create_scheduler
from torchx.specs import AppDef, Resource, Role

from k2.config.deployment import Placement
from k2.errors import UserError
from k2.launch.app import application
from k2.launch.backend import Backend, State, Terms
from k2.launch.indexed_job import IndexedJob
from k2.launch.node import main as node_main
from k2.launch.trainjob import TrainJob
from tests.launch.conftest import placement

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
NAME = "k2-pretrain-0123456789-1"


def app(here: Placement) -> AppDef:
    return application(NAME, here, ["k2.launch.rank", "runs/r/jobs/x.json"], {"K2_RUN": "r"})


def whole(stage: str = "pretrain", pool: str = "gpus") -> Placement:
    """A placement that uses every field a job may have."""
    here = placement(stage, pool)
    taint = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
    changes = {
        "rdma": {"rdma/hca": 1},
        "nccl": {"NCCL_IB_HCA": "mlx5"},
        "node_labels": {"gpu": "h100"},
        "tolerations": (taint,),
        "shm": "8Gi",
        "scratch": {"size": "1Ti", "storage_class": "nvme"},
        "grace_s": 120,
    }
    extra = {
        "pull_secrets": ["registry"],
        "secrets": {
            "K2_METRICS_TOKEN": {"secret": "k2-metrics", "key": "token"},
            "K2_LLM_API_KEY": {"secret": "llm", "key": "key"},
        },
        "network": {"ca_config_map": "ca"},
    }
    return Placement.model_validate(here.model_dump() | extra | {"pool": here.pool.model_dump() | changes})


def volcano(here: Placement) -> dict[str, Any]:
    """torchx's own dry run, with the random part of the name taken out."""
    options = {"queue": "team", "namespace": "ml", "validate_spec": False, "service_account": "k2-rank"}
    text = str(create_scheduler("test").submit_dryrun(app(here), options))
    body: dict[str, Any] = yaml.safe_load(text)
    return yaml.safe_load(text.replace(body["metadata"]["name"], NAME))


def jobs(pool: str) -> dict[str, dict[str, Any]]:
    terms = Terms("ml", "k2-gpu", 3600, ("TrainingRuntime", "k2-torch-gpu"))
    return {
        "job": IndexedJob().job(app(whole(pool=pool)), terms),
        "trainjob": TrainJob().job(app(whole(pool=pool)), terms),
    }


@pytest.mark.parametrize("version", ["1.35", "1.36", "1.37"])
@pytest.mark.parametrize("pool", ["job", "pair", "gpus"])
def test_jobs_and_services_are_valid(version: str, pool: str) -> None:
    import kubernetes_validate

    job = jobs(pool)["job"]
    kubernetes_validate.validate(job, version, strict=True)
    for _, companion in IndexedJob().companions(job | {"metadata": job["metadata"] | {"uid": "u"}}):
        kubernetes_validate.validate(companion, version, strict=True)


@pytest.mark.parametrize("pool", ["job", "gpus"])
def test_trainjobs_are_valid(pool: str) -> None:
    """The models of Kubeflow refuse wrong types; that nothing is lost on the way through them shows unknown fields."""
    body = jobs(pool)["trainjob"]
    model = TrainerV1alpha1TrainJob.from_dict(body)
    assert model is not None
    assert json.loads(model.to_json()) == body


def test_trainjobs_leave_trainers_own_variables_alone() -> None:
    names = [each["name"] for each in jobs("gpus")["trainjob"]["spec"]["trainer"]["env"]]
    assert not [name for name in names if name.startswith("PET_")]


def pods(kind: str) -> list[dict[str, Any]]:
    """The pod templates of one kind of job."""
    if kind == "volcano":
        return [task["template"] for task in volcano(whole())["spec"]["tasks"]]
    return [jobs("gpus")["job"]["spec"]["template"]]


@pytest.mark.parametrize("kind", ["job", "volcano"])
def test_pods_are_as_restricted_as_can_be(kind: str) -> None:
    for pod in pods(kind):
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"].keys() >= {"cpu", "memory", "nvidia.com/gpu", "rdma/hca"}
        assert {each["mountPath"] for each in container["volumeMounts"]} >= {"/scratch", "/tmp", "/dev/shm"}
        plain = [each for each in container["env"] if "value" in each]
        assert not [each for each in plain if "KEY" in each["name"] or "TOKEN" in each["name"]]


def test_what_volcano_gets_is_as_recorded() -> None:
    """`K2_UPDATE=1 pytest tests/launch` writes it anew."""
    import os

    made = yaml.safe_dump(volcano(whole()), sort_keys=True)
    file = GOLDEN / "volcano.yaml"
    if os.environ.get("K2_UPDATE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(made)
    assert made == file.read_text()


def commands(here: Placement) -> dict[str, list[str]]:
    """What each scheduler starts on the first node."""
    job = IndexedJob().job(app(here), Terms("ml"))["spec"]["template"]["spec"]["containers"][0]
    trainer = TrainJob().job(app(here), Terms("ml"))["spec"]["trainer"]
    (container,) = volcano(here)["spec"]["tasks"][0]["template"]["spec"]["containers"]
    return {
        "job": job["command"] + job["args"],
        "trainjob": trainer["command"] + trainer["args"],
        "volcano": container["command"],
    }


def test_all_schedulers_start_the_same_command() -> None:
    found = commands(whole())
    differ = {"$(JOB_COMPLETION_INDEX)", "0", "K2_RANK0_HOST", "PET_MASTER_ADDR", "TORCHX_RANK0_HOST"}
    same = {kind: [part for part in command if part not in differ] for kind, command in found.items()}
    assert same["job"] == same["trainjob"] == same["volcano"]
    assert same["job"][-4:] == ["8", "--", "k2.launch.rank", "runs/r/jobs/x.json"]
    assert not [part for command in found.values() for part in command if "${" in part]


def test_a_stage_of_one_process_takes_one_node_and_one_process() -> None:
    arguments = application("k2-sft", whole("sft", "job"), ["m"]).roles[0].args
    assert arguments[arguments.index("--processes") + 1] == "1"


def test_a_digest_tells_specifications_apart() -> None:
    def digest(here: Placement, name: str = "r") -> str:
        made = IndexedJob().job(application(NAME, here, ["m"], {"K2_RUN": name}), Terms("ml"))
        return str(made["metadata"]["annotations"]["k2.dev/spec-digest"])

    assert digest(whole()) == digest(whole())
    assert len({digest(whole()), digest(whole(pool="pair")), digest(whole(), "other")}) == 3


def test_applications_of_others_run_too() -> None:
    role = Role("echo", "alpine@sha256:0", entrypoint="echo", args=["hi"], resource=Resource(cpu=1, gpu=0, memMB=64))
    (container,) = IndexedJob().job(AppDef("echo", [role]), Terms("ml"))["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["echo"]
    assert container["resources"]["limits"] == {"cpu": "1000m", "memory": "64Mi"}
    with pytest.raises(UserError, match="has the roles echo, echo; a job has one"):
        TrainJob().job(AppDef("two", [role, role]), Terms("ml"))


CONDITIONS = [("Complete", State.COMPLETE), ("Failed", State.FAILED), ("Suspended", State.SUSPENDED)]


@pytest.mark.parametrize("backend", [IndexedJob(), TrainJob()], ids=["job", "trainjob"])
@pytest.mark.parametrize(("condition", "state"), CONDITIONS)
def test_conditions_say_where_a_job_is(backend: Backend, condition: str, state: State) -> None:
    held = {"type": condition, "status": "True", "reason": "R", "message": "m"}
    assert backend.status({"spec": {}, "status": {"conditions": [held]}}).state is state
    assert backend.status({"spec": {}, "status": {"conditions": [held]}}).reason == "R: m"
    assert backend.status({"spec": {}, "status": {"conditions": [held | {"status": "False"}]}}).state is State.PENDING
    assert backend.status({"spec": {"suspend": True}}).state is State.SUSPENDED


def test_running_is_when_pods_are_ready() -> None:
    job, train = IndexedJob(), TrainJob()
    assert job.status({"spec": {}, "status": {"active": 2, "ready": 0}}).state is State.PENDING
    assert job.status({"spec": {}, "status": {"active": 2, "ready": 1}}).state is State.RUNNING
    assert job.status({"spec": {}, "status": {"active": 2}}).state is State.RUNNING
    counts = {"name": "node", "ready": 1, "succeeded": 0, "active": 1, "failed": 0, "suspended": 0}
    assert train.status({"spec": {}, "status": {"jobsStatus": [counts]}}).state is State.RUNNING
    assert train.status({"spec": {}, "status": {"jobsStatus": [counts | {"ready": 0}]}}).state is State.PENDING


PROGRAM = """
import os, pathlib, sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
me = f"rank {dist.get_rank()} of {dist.get_world_size()} on node {os.environ['GROUP_RANK']}"
print(f"{me}: {total.item():g}", flush=True)
dist.destroy_process_group()
codes = os.environ["CODE"].split()
tries = pathlib.Path(os.environ["TRIES"])
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
sys.exit(int(codes[min(len(tries.read_text()), len(codes)) - 1]))
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`node(index, nodes, code)` starts what a job runs on one of its nodes."""
    (tmp_path / "summing.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}")
    monkeypatch.setenv("FIRST", "127.0.0.1")

    def start(index: int, nodes: int, code: str = "0") -> "subprocess.Popen[str]":
        meet = ["--nodes", str(nodes), "--node", str(index), "--host-in", "FIRST", "--port", "29611"]
        command = [sys.executable, "-m", "k2.launch.node", *meet, "--processes", "1", "--", "summing"]
        monkeypatch.setenv("CODE", code)
        monkeypatch.setenv("TRIES", str(tmp_path / f"tries-{index}"))
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def test_nodes_meet_and_their_ranks_are_numbered_by_node(node: Any) -> None:
    processes = [node(index, 2) for index in (1, 0)]
    outputs = {f"node {1 - index}": process.communicate(timeout=60)[0] for index, process in enumerate(processes)}
    assert "rank 0 of 2 on node 0: 3" in outputs["node 0"]
    assert "rank 1 of 2 on node 1: 3" in outputs["node 1"]


@pytest.mark.parametrize(("code", "seen"), [("2", 2), ("3", 1)])
def test_a_users_error_is_told_from_others(node: Any, code: str, seen: int) -> None:
    """Kubernetes runs a pod again unless its exit code is 2."""
    process = node(0, 1, code)
    process.communicate(timeout=60)
    assert process.returncode == seen


def test_ranks_that_hung_start_again_in_their_pod(node: Any, tmp_path: Path) -> None:
    """And a user's error after that still ends the job."""
    process = node(0, 1, "75 2 0")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2, output
    assert (tmp_path / "tries-0").read_text() == "xx"
    assert "the ranks hung: restart 1 of 3" in output


@pytest.mark.parametrize(
    ("nodes", "codes", "seen", "tries"),
    [(1, [75, 75, 0], 0, 3), (1, [75] * 9, 1, 4), (1, [1, 0], 1, 1), (1, [-9, 0], 1, 1), (2, [75, 0], 1, 1)],
)
def test_only_hung_ranks_of_a_single_node_start_again(
    nodes: int, codes: list[int], seen: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several nodes the job starts the pods again: a new pod would not meet those that count on."""
    left = list(codes)
    monkeypatch.setattr("k2.launch.node._attempt", lambda _: left.pop(0))
    numbers = ["--nodes", str(nodes), "--node", "0", "--port", "1", "--processes", "1"]
    assert node_main([*numbers, "--host-in", "X", "--", "summing"]) == seen
    assert len(codes) - len(left) == tries
