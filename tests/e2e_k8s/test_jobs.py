"""Stages in pods: as a Job, launched by a step, adopted, cancelled, killed and resumed."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from k2.errors import StageError
from k2.launch.app import application
from k2.launch.backend import Terms
from k2.launch.indexed_job import IndexedJob
from k2.launch.launcher import Launcher, Times
from k2.launch.work import Work
from k2.store.artifacts import find, open_uri
from k2.store.client import Store
from tests.conftest import SilentProgress
from tests.e2e_containers.daemons import wait
from tests.e2e_k8s.cluster import Object
from tests.e2e_k8s.conftest import RUNNER, SPACE, Platform
from tests.e2e_k8s.pods import WORKFLOWS, cluster_of, job, placement, step

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
DATA = ("corpus", "ingest", "rephrase", "tokenize")
SECONDS = 300
LONGER = "pretrain.stable_tokens=40960"
"""Training that can be caught in the middle."""

PROCESSES = """
import json, subprocess, sys
def k2(*arguments):
    return json.loads(subprocess.run(["k2", *arguments, "--json"], check=True, stdout=subprocess.PIPE).stdout)
*stages, last, override = sys.argv[1:]
made = {stage: k2(stage, "--preset", "nano")["artifact"] for stage in stages}
made[last] = k2(last, "--preset", "nano", "--set", override)["artifact"]
print(json.dumps({stage: k2("lineage", uri)["digest"] for stage, uri in made.items()}))
"""
LAUNCH = """
import sys
from k2.config.load import load_config
from k2.execution.chain import stage_config, upstream
from k2.execution.component import recorded
from k2.execution.registry import STAGES
from k2.store.client import Store
config, stage, run = load_config("nano", {"pretrain": {"stable_tokens": int(sys.argv[3])}}), sys.argv[1], sys.argv[2]
found = upstream(config, stage, Store.from_environment(), set(STAGES[stage].inputs))
manifests = {name: artifact.manifest.model_dump_json() for name, artifact in found.items()}
print(recorded(stage, stage_config(config, stage), manifests, run).artifact.uri)
"""
"""What the component of a stage does, with inputs found rather than handed over by Kubeflow."""

PREPARE = """
import sys
from k2.config.load import load_config
from k2.execution.chain import upstream
from k2.execution.runner import key_of
from k2.launch.launcher import Launcher, Times
from k2.launch.work import Work
from k2.store.client import Store
config, store = load_config("nano", {"pretrain": {"stable_tokens": int(sys.argv[2])}}), Store.from_environment()
inputs = upstream(config, "pretrain", store, ["tokens"])
key, values = key_of("pretrain", config.pretrain, inputs, store), config.pretrain.model_dump(mode="json")
work = Work(run=sys.argv[1], stage="pretrain", config=values, inputs={"tokens": inputs["tokens"].uri}, key=key)
work.save(store)
print(work.model_dump_json())
"""
"""What a launcher asks a job for."""


def ended(platform: Platform, kind: str, name: str) -> Object:
    """A pod or a job that came to its end."""
    path = {"pod": f"/api/v1/namespaces/{SPACE}/pods", "job": f"/apis/batch/v1/namespaces/{SPACE}/jobs"}[kind]

    def over() -> bool:
        status = platform.kubernetes.read(f"{path}/{name}")["status"]
        return status.get("phase") in ("Succeeded", "Failed") or bool(status.get("conditions") and kind == "job")

    wait(over, SECONDS, lambda: platform.kubernetes.kubectl("describe", kind, name, f"-n={SPACE}")[-3000:])
    return platform.kubernetes.read(f"{path}/{name}")


def logs(platform: Platform, what: str) -> str:
    return platform.kubernetes.kubectl("logs", what, f"-n={SPACE}", "--tail=-1")


@pytest.fixture(scope="module")
def alone(platform: Platform) -> dict[str, str]:
    """Stage -> digest, made by processes of one pod that share nothing with others: a prefix of their own."""
    spot = placement(platform.image, "corpus")
    body = job("alone", spot, "python", "-c", PROCESSES, *DATA, "pretrain", LONGER)
    container = body["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [each for each in container["env"] if each["name"] != "K2_S3_PREFIX"]
    container["env"].append({"name": "K2_S3_PREFIX", "value": "alone"})
    platform.kubernetes.apply(body)
    assert ended(platform, "job", "alone")["status"].get("succeeded") == 1, logs(platform, "job/alone")
    return dict(json.loads(logs(platform, "job/alone").splitlines()[-1]))


@pytest.fixture(scope="module")
def workflow(platform: Platform) -> Object:
    """A run of Argo's."""
    platform.kubernetes.apply(WORKFLOWS)
    platform.kubernetes.kubectl("wait", "--for=condition=Established", "crd/workflows.argoproj.io", "--timeout=30s")
    return started(platform, "run-1")


def started(platform: Platform, name: str) -> Object:
    body = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": {"name": name, "namespace": SPACE}}
    platform.kubernetes.apply(body | {"spec": {}})
    return platform.kubernetes.read(f"/apis/argoproj.io/v1alpha1/namespaces/{SPACE}/workflows/{name}")


@pytest.fixture(scope="module")
def data(platform: Platform) -> dict[str, str]:
    """Stage -> URI, made by a Job of the image."""
    spot = placement(platform.image, "corpus")
    shell = " && ".join(f"k2 {stage} --preset nano --json" for stage in DATA)
    platform.kubernetes.apply(job("data", spot, "sh", "-c", shell))
    assert ended(platform, "job", "data")["status"].get("succeeded") == 1, logs(platform, "job/data")
    decoder, text, found = json.JSONDecoder(), logs(platform, "job/data"), []
    while text.strip():
        start = text.index("{")
        each, length = decoder.raw_decode(text[start:])
        text = text[start + length :]
        found += [each] if "artifact" in each else []
    return {each["stage"]: each["artifact"] for each in found}


def test_stages_as_a_job_make_what_processes_make(data: dict[str, str], alone: dict[str, str], store: Store) -> None:
    assert {stage: open_uri(store, uri).digest for stage, uri in data.items()} == {
        stage: alone[stage] for stage in DATA
    }


def test_a_step_launches_a_job_that_is_killed_and_resumes(
    platform: Platform, workflow: Object, data: dict[str, str], alone: dict[str, str], store: Store
) -> None:
    """The launcher's pod has Kubeflow's account; the job's pod has one without rights, and dies in the middle."""
    spot = placement(platform.image, "pretrain")
    tokens = LONGER.partition("=")[2]
    platform.kubernetes.apply(step("step-1", workflow, spot, "python", "-c", LAUNCH, "pretrain", "run-1", tokens))
    wait(lambda: saved(platform, store), SECONDS, lambda: logs(platform, "step-1"))
    (first,) = ranks(platform, "run-1")
    platform.kubernetes.kubectl(
        "delete", "pod", first["metadata"]["name"], f"-n={SPACE}", "--force", "--grace-period=0"
    )
    assert ended(platform, "pod", "step-1")["status"]["phase"] == "Succeeded", logs(platform, "step-1")
    uri = logs(platform, "step-1").split()[-1]
    assert open_uri(store, uri).digest == alone["pretrain"]
    (job,) = jobs(platform, "run-1")
    assert job["metadata"]["ownerReferences"][0]["uid"] == workflow["metadata"]["uid"]
    (last,) = [each for each in ranks(platform, "run-1") if each["status"]["phase"] == "Succeeded"]
    assert last["metadata"]["name"] != first["metadata"]["name"]
    assert last["spec"]["serviceAccountName"] == "k2-rank"


def saved(platform: Platform, store: Store) -> bool:
    """Whether some of the training is safe already."""
    # A label holds all but the last of a key's characters.
    keys = [each["metadata"]["labels"]["k2.dev/key"] for each in jobs(platform, "run-1")]
    return any(not info.name.endswith("lease.json") for key in keys for info in store.list(f"work/{key}"))


def jobs(platform: Platform, run: str) -> list[Object]:
    """What K2 launched for a run."""
    found = platform.kubernetes.read(f"/apis/batch/v1/namespaces/{SPACE}/jobs?labelSelector=k2.dev/run%3D{run}")
    return list(found["items"])


def ranks(platform: Platform, run: str) -> list[Object]:
    """Pods of the launched jobs."""
    found = platform.kubernetes.read(f"/api/v1/namespaces/{SPACE}/pods?labelSelector=job-name,k2.dev/run%3D{run}")
    return list(found["items"])


def kinds(progress: SilentProgress) -> set[str]:
    """Kinds of the events so far."""
    return {event["kind"] for event in progress.events}


def test_two_pods_train_together(platform: Platform, data: dict[str, str], store: Store) -> None:
    """Ranks meet by the name of the first pod in the headless Service, and publish one artifact.

    Kubernetes 1.20 has no Indexed Jobs, so the test does what their controller does: one pod for each index, with the
    index in its environment and in its host name. Template, arguments and Service are the backend's own.
    """
    spot = placement(platform.image, "pretrain", nodes=2, cpu="500m", memory="2Gi")
    work = prepared(platform, "two", 9216)
    backend, terms = IndexedJob(), Terms(SPACE)
    asked = backend.job(application("k2-two", spot, ["k2.launch.rank", work.location], {"K2_RUN": work.run}), terms)
    platform.kubernetes.apply(*(body for _, body in backend.companions(asked)), *indexed(asked))
    for name in ("k2-two-0", "k2-two-1"):
        assert ended(platform, "pod", name)["status"]["phase"] == "Succeeded", logs(platform, name)
    artifact = find(store, "pretrain", work.key)
    assert artifact is not None
    assert artifact.intact()


def prepared(platform: Platform, run: str, tokens: int) -> Work:
    """Pretraining as a launcher asks for it, put into the store by the image: only the same code makes the same key."""
    name, spot = f"prepare-{run}", placement(platform.image, "corpus")
    platform.kubernetes.apply(job(name, spot, "python", "-c", PREPARE, run, str(tokens)))
    assert ended(platform, "job", name)["status"].get("succeeded") == 1, logs(platform, f"job/{name}")
    return Work.model_validate_json(logs(platform, f"job/{name}"))


def indexed(asked: Object) -> list[Object]:
    """The pods that the controller of an Indexed Job makes."""
    name, found = asked["metadata"]["name"], []
    for index in range(asked["spec"]["completions"]):
        pod = copy.deepcopy(asked["spec"]["template"])
        pod["metadata"] |= {"name": f"{name}-{index}", "namespace": SPACE}
        pod["metadata"]["labels"] |= {"job-name": name}
        pod["spec"]["hostname"] = f"{name}-{index}"
        pod["spec"]["containers"][0]["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
        found.append({"apiVersion": "v1", "kind": "Pod", **pod})
    return found


def test_a_live_job_is_adopted_and_goes_with_its_workflow(
    platform: Platform, workflow: Object, data: dict[str, str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers here, with the token of Kubeflow's account and as a step of run-2; cancelling deletes the workflow."""
    spot = placement(platform.image, "pretrain")
    cancelled = started(platform, "run-2")
    platform.kubernetes.apply(step("step-2", cancelled, spot, "sleep", "600"))
    monkeypatch.setenv("K2_POD_NAME", "step-2")
    work, progress = prepared(platform, "run-2", 10**7), [SilentProgress(), SilentProgress()]
    with ThreadPoolExecutor() as pool:
        launchers = [Launcher(cluster_of(platform, RUNNER), spot, store, each, Times(poll_s=0.5)) for each in progress]
        first = pool.submit(launchers[0].run, work)
        wait(lambda: bool(jobs(platform, "run-2")), SECONDS, lambda: str(progress[0].events))
        second = pool.submit(launchers[1].run, work)
        wait(lambda: "job_adopted" in kinds(progress[1]), SECONDS, lambda: str(progress[1].events))
        platform.kubernetes.kubectl("delete", "workflow", "run-2", f"-n={SPACE}", "--cascade=foreground")
        for each in (first, second):
            assert isinstance(each.exception(SECONDS), StageError)
    assert "job_created" in kinds(progress[0])
    assert "job_created" not in kinds(progress[1])
    wait(lambda: not ranks(platform, "run-2"), SECONDS, lambda: str(ranks(platform, "run-2")))
    assert jobs(platform, "run-2") == []
