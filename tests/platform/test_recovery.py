"""docs/runbooks/recovery.md, run: Kubeflow is empty, this machine is new, the bucket and Git are what they were."""

import json
import re
import shlex
import uuid
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from k2.cli import main
from k2.config.deployment import Deployment
from k2.platform.documents import read_section
from k2.platform.render import SPEC_TAG
from k2.store.aliases import move_alias, read_alias
from k2.store.artifacts import Artifact, ArtifactWriter, open_uri
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea
from tests.platform import fake_kubeflow as fake

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "runbooks" / "recovery.md").read_text()
COMMANDS = re.findall(r"^\s*\$ k2 (.*)$", PAGE, re.MULTILINE)
DEPLOYMENT = "pipelines/deployments/gpu.yaml"


def k2(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def publish(store: Store, kind: str, **inputs: Artifact) -> Artifact:
    key, provenance = uuid.uuid4().hex, {"inputs": {name: each.uri for name, each in inputs.items()}}
    with Lease(store, f"work/{key}/lease.json") as lease:
        writer = ArtifactWriter(store, kind, key, WorkArea(store, key, lease), provenance)
        writer.path("data").write_text(kind)
        made = writer.publish()
        writer.discard()
    return made


def recurring(kubeflow: fake.Kubeflow) -> dict[str, Any]:
    """What a recurring run is, without the identities that a server makes."""
    names = {row["pipeline_version_id"]: row["name"] for row in kubeflow.rows("versions")}
    return {
        row["display_name"]: {
            "status": row["status"],
            "trigger": row["trigger"],
            "parameters": row["runtime_config"]["parameters"],
            "version": names[row["pipeline_version_reference"]["pipeline_version_id"]],
        }
        for row in kubeflow.rows("recurringruns")
    }


def versions(kubeflow: fake.Kubeflow) -> dict[str, str]:
    return {row["name"]: row["tags"][SPEC_TAG] for row in kubeflow.rows("versions")}


def test_aliases_and_schedules_come_back(
    store: Store, kubeflow: fake.Kubeflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    champion = publish(store, "export", model=publish(store, "rl", tokens=publish(store, "corpus")))
    move_alias(store, read_alias(store, "champion"), champion)
    k2("pipeline", "upload", "--deployment", DEPLOYMENT)
    k2("schedule", "apply", "pipelines/schedules.yaml", "--deployment", DEPLOYMENT)
    before = recurring(kubeflow), versions(kubeflow)
    assert len(before[0]) == 2
    # Whoever was applying schedules died with the cluster, a second ago.
    holder = {"token": 7, "owner": "x", "host": "pod-that-was", "pid": 1, "expires": 0.0}
    store.put("schedules/lease.json", json.dumps(holder).encode())

    monkeypatch.setenv("K2_HOME", str(tmp_path / "new-machine"))
    with fake.serve(fake.Kubeflow()) as after:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", after.url)
        assert (recurring(after), versions(after)) == ({}, {})
        outputs = {command: k2(*shlex.split(command)) for command in COMMANDS}
        assert (recurring(after), versions(after)) == before
        again = json.loads(k2("schedule", "plan", "pipelines/schedules.yaml", "--deployment", DEPLOYMENT, "--json"))
        (run,) = after.rows("runs")
    assert {each["action"] for each in again} == {"keep"}
    assert champion.digest[:12] in outputs["lineage champion"]
    assert "+ weekly: create" in next(text for command, text in outputs.items() if command.startswith("schedule plan"))
    assert run["runtime_config"]["parameters"]["run"] == "interrupted"
    found = read_alias(store, "champion").artifact(store)
    assert found is not None
    assert found.intact()
    assert open_uri(store, champion.uri).path("data").read_text() == "export"


def test_the_page_names_all_that_the_platform_keeps_outside_the_bucket() -> None:
    deployment = read_section(ROOT / "manifests" / "overlays" / "prod" / "deployment.yaml", Deployment)
    secrets = {deployment.store.secret, *(key.secret for key in deployment.secrets.values())}
    assert not [name for name in secrets if f"`{name}`" not in PAGE]
    assert [command.split()[0] for command in COMMANDS] == ["lineage", "pipeline", "schedule", "schedule", "pipeline"]
