"""Code that nobody has read, in pods of a real cluster, with the rights of pipeline steps."""

from dataclasses import replace
from typing import Any

import pytest

from k2.config.deployment import Deployment
from k2.launch.cluster import PODS, ClusterError
from k2.sandbox.contract import Limits, Result
from k2.sandbox.pod import PodSandbox
from tests.e2e_containers.daemons import wait
from tests.e2e_k8s.cluster import Object
from tests.e2e_k8s.conftest import RUNNER, SPACE, Platform
from tests.e2e_k8s.pods import WORKFLOWS, cluster_of, placement, step
from tests.e2e_k8s.test_jobs import SECONDS, started

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
LIMITS = Limits(wall_s=20.0, memory="256Mi", disk="16Mi", processes=32)
RUNTIME: Object = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "k2-e2e"},
    "handler": "runc",
}
"""The node has no other runtime: what is tested is that the pod asks for the class."""

LOOKS_AROUND = """
import os, pathlib, sys
from lib.word import WORD
def refused(what):
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return "allowed"
print(WORD, sys.argv[1], sorted(path.name for path in pathlib.Path(".").iterdir()))
print(os.getuid() > 1000, os.getppid(), sorted(set(os.environ) - {"LC_CTYPE"}))
print(refused(lambda: os.listdir("/var/run/secrets/kubernetes.io")), refused(lambda: open("/opt/k2/x", "w")))
print(refused(lambda: os.kill(1, 9)), refused(lambda: open("/proc/1/mem", "rb")), refused(lambda: os.setuid(0)))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")))
sys.exit(5)
"""
FORKS = """
import os, time
made = 0
try:
    while made < 1000:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except BlockingIOError:
    print(made < 32)
"""


def sandbox(platform: Platform, **where: Any) -> PodSandbox:
    deployment = {
        "images": {"cpu": platform.image},
        "store": {"secret": "k2-s3"},
        "pools": {"light": {}},
        "default_pool": "light",
        "sandbox": where,
    }
    return PodSandbox(cluster_of(platform, RUNNER), Deployment.model_validate(deployment))


def ran(platform: Platform, code: str, limits: Limits = LIMITS, **where: Any) -> Result:
    return sandbox(platform, **where).run(["python", "main.py"], {"main.py": code.encode()}, limits)


def left(platform: Platform) -> list[str]:
    """Objects of sandboxes."""
    lists = [platform.kubernetes.read(f"/api/v1/namespaces/{SPACE}/{kind}") for kind in ("pods", "configmaps")]
    names = [each["metadata"]["name"] for found in lists for each in found["items"]]
    return [name for name in names if name.startswith("k2-sandbox-")]


def test_a_program_has_its_files_and_nothing_else(platform: Platform) -> None:
    platform.kubernetes.apply(RUNTIME)
    files = {"main.py": LOOKS_AROUND.encode(), "lib/word.py": b"WORD = 'read'"}
    result = sandbox(platform, runtime_class="k2-e2e").run(["python", "main.py", "$(PATH) $$"], files, LIMITS)
    assert result.output.splitlines() == [
        "read $(PATH) $$ ['lib', 'main.py']",
        "True 1 ['HOME', 'LANG', 'PATH']",
        "FileNotFoundError OSError",
        "allowed PermissionError PermissionError",
        "0000000000000000",
    ]
    assert (result.exit_code, result.exceeded) == (5, "")
    wait(lambda: not left(platform), 60, lambda: str(left(platform)))


@pytest.mark.parametrize(
    ("code", "exceeded"),
    [
        ("import time; print('a', flush=True); time.sleep(600)", "time"),
        ("print('a', flush=True); x = [bytearray(2**24) for _ in range(64)]", "memory"),
        ("while True: print('a' * 1000)", "output"),
    ],
)
def test_limits_end_it(platform: Platform, code: str, exceeded: str) -> None:
    result = ran(platform, code, replace(LIMITS, wall_s=8.0))
    assert (result.exceeded, result.exit_code) == (exceeded, 137)
    assert result.output.startswith("a")
    assert len(result.output) <= LIMITS.output_bytes


def test_processes_are_few(platform: Platform) -> None:
    assert ran(platform, FORKS).output == "True\n"


def test_a_runtime_that_is_not_there_is_refused(platform: Platform) -> None:
    with pytest.raises(ClusterError, match="absent"):
        ran(platform, "", runtime_class="absent")


def test_a_sandbox_goes_with_the_run_that_started_it(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the step that waits for it is gone: nobody deletes it then but the cluster."""
    platform.kubernetes.apply(WORKFLOWS)
    platform.kubernetes.kubectl("wait", "--for=condition=Established", "crd/workflows.argoproj.io", "--timeout=30s")
    workflow = started(platform, "run-3")
    platform.kubernetes.apply(step("step-3", workflow, placement(platform.image, "rl"), "sleep", "600"))
    monkeypatch.setenv("K2_POD_NAME", "step-3")
    cluster_of(platform, RUNNER).create(PODS, sandbox(platform).pod("k2-sandbox-orphan", ["true"], {}, LIMITS))
    assert left(platform) == ["k2-sandbox-orphan"]
    platform.kubernetes.kubectl("delete", "workflow", "run-3", f"-n={SPACE}", "--cascade=background")
    wait(lambda: not left(platform), SECONDS, lambda: str(left(platform)))
