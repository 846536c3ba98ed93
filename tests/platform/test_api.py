"""Upload, submit, watch, cancel and prune over HTTP, against the stand-in of the API server."""

import json
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from k2.cli import main
from k2.config.deployment import Kubeflow
from k2.errors import StageError, UserError
from k2.monitoring.run_record import write_stage_record
from k2.platform import runs
from k2.platform.api import ApiError, PipelinesApi, UnreachableError
from k2.platform.render import SPEC_TAG, Rendering
from k2.platform.runs import cancel, submit, submit_next, watch
from k2.platform.versions import find_version, prune, upload
from k2.store.client import Store
from tests.platform import fake_kubeflow as fake
from tests.platform.conftest import DEPLOYMENTS

DEPLOYMENT = DEPLOYMENTS / "cpu.yaml"


def altered(rendering: Rendering, number: int) -> Rendering:
    """Another version of the same pipeline."""
    return Rendering(
        rendering.pipeline, rendering.description, rendering.spec | {"sdkVersion": str(number)}, rendering.platform
    )


def k2(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["pipeline", *arguments, "--deployment", str(DEPLOYMENT)])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "POLL_S", 0.02)


# Versions.


def test_upload_is_idempotent_by_content(api: PipelinesApi, kubeflow: fake.Kubeflow, rendering: Rendering) -> None:
    assert upload(api, [rendering], "abc")[0].new
    assert not upload(api, [rendering], "def")[0].new
    assert upload(api, [altered(rendering, 2)], "")[0].new
    first, second = reversed(kubeflow.rows("versions"))
    assert first["name"] == rendering.version
    assert first["tags"] == {"k2-spec": rendering.digest, "k2-revision": "abc"}
    assert second["tags"].keys() == {"k2-spec"}
    assert len(kubeflow.rows("pipelines")) == 1


def test_what_is_read_back_is_what_was_uploaded(
    api: PipelinesApi, kubeflow: fake.Kubeflow, rendering: Rendering
) -> None:
    """A server without tags is understood by content; KFP returns numbers of a Struct as floats."""
    upload(api, [rendering], "")
    (version,) = kubeflow.tables["versions"].values()
    version["tags"] = {}
    version["pipeline_spec"] = json.loads(json.dumps(version["pipeline_spec"]), parse_int=float)
    assert not upload(api, [rendering], "")[0].new
    version["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]["report"]["taskInfo"]["name"] = "changed"
    with pytest.raises(UserError, match=f"{rendering.version}: the API server has a version of this name with other"):
        upload(api, [rendering], "")


def test_a_version_with_another_digest_in_its_tags_is_refused(
    api: PipelinesApi, kubeflow: fake.Kubeflow, rendering: Rendering
) -> None:
    upload(api, [rendering], "")
    next(iter(kubeflow.tables["versions"].values()))["tags"][SPEC_TAG] = "0" * 40
    with pytest.raises(UserError, match="other content"):
        upload(api, [altered(rendering, 2), rendering], "")
    assert len(kubeflow.rows("versions")) == 1, "nothing is made when one of them cannot be"


def test_find_version(api: PipelinesApi, rendering: Rendering) -> None:
    with pytest.raises(UserError, match=r"pipeline 'k2': not on http.*`k2 pipeline upload` puts it there"):
        find_version(api, "k2", None)
    versions = [altered(rendering, number) for number in range(4)]
    for each in versions:
        upload(api, [each], "")
    assert find_version(api, "k2", None).name == versions[-1].version
    assert find_version(api, "k2", versions[0].version).name == versions[0].version
    with pytest.raises(UserError, match="version 'k2-0': k2 has none of that name; the newest are k2-"):
        find_version(api, "k2", "k2-0")


def test_prune_keeps_the_newest_and_what_is_in_use(
    api: PipelinesApi, kubeflow: fake.Kubeflow, rendering: Rendering
) -> None:
    versions = [altered(rendering, number) for number in range(8)]
    for each in versions:
        upload(api, [each], "")
    pipeline = api.pipeline("k2")
    assert pipeline is not None
    kubeflow.insert("versions", "pipeline_version_id", {"pipeline_id": pipeline.pipeline_id, "name": "by-hand"})
    in_schedule, in_run, in_old_run = (find_version(api, "k2", versions[number].version) for number in range(3))
    api.create_recurring_run(
        "nightly", in_schedule, cron="0 0 3 * * *", parameters={}, max_concurrency="1", no_catchup=True, description=""
    )
    submit(api, in_run, {}, "live")
    submit(api, in_old_run, {}, "old")
    kubeflow.finish("old", "SUCCEEDED")
    expected = [versions[number].version for number in (5, 4, 3, 2)]
    assert prune(api, 2, dry_run=True) == expected
    assert len(kubeflow.rows("versions")) == 9
    assert prune(api, 2, dry_run=False) == expected
    left = {row["name"] for row in kubeflow.rows("versions")}
    assert left == {"by-hand", *(versions[number].version for number in (0, 1, 6, 7))}


# Runs.


@pytest.fixture
def version(api: PipelinesApi, rendering: Rendering) -> Any:
    upload(api, [rendering], "")
    return find_version(api, "k2", None)


def test_submit_types_and_checks_the_parameters(api: PipelinesApi, kubeflow: fake.Kubeflow, version: Any) -> None:
    submit(api, version, {"preset": "nano", "overrides": "rl: {seed: 3}"}, None)
    (run,) = kubeflow.rows("runs")
    assert run["runtime_config"]["parameters"] == {"preset": "nano", "overrides": "rl: {seed: 3}"}
    assert run["display_name"].startswith(version.name)
    assert kubeflow.rows("experiments")[0]["display_name"] == "k2"
    for values, message in [
        ({"presets": "nano"}, "parameter 'presets': the pipeline has none; its parameters are overrides, preset, run"),
        ({"preset": "huge"}, "preset: 'huge' is unknown"),
        ({"overrides": "rl: {sed: 3}"}, "rl.sed: no such field"),
    ]:
        with pytest.raises(UserError, match=message):
            submit(api, version, values, None)
    assert len(kubeflow.rows("runs")) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"only_if_new": "false"}, {"only_if_new": False}),
        ({"budget": "10"}, {"budget": 10}),
        ({"budget_days": "7"}, {"budget_days": 7}),
        ({"budget_days": "7.5"}, "parameter budget_days: '7.5' is no number integer"),
        ({"budget_days": "true"}, "parameter budget_days: 'true' is no number integer"),
        ({"only_if_new": "1"}, "parameter only_if_new: '1' is no boolean"),
        ({"budget": "much"}, "parameter budget: 'much' is no number double"),
    ],
)
def test_parameters_have_the_pipeline_s_types(
    api: PipelinesApi, guarded: Rendering, values: dict[str, str], expected: dict[str, Any] | str
) -> None:
    upload(api, [guarded], "")
    found = find_version(api, "k2-retrain", None)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            runs.typed(values, found)
    else:
        assert runs.typed(values, found) == expected


def test_a_named_run_is_adopted_while_it_lives_or_is_done(
    api: PipelinesApi, kubeflow: fake.Kubeflow, version: Any
) -> None:
    first = submit(api, version, {"preset": "nano"}, "nightly-1")
    assert kubeflow.rows("runs")[0]["runtime_config"]["parameters"]["run"] == "nightly-1"
    assert submit(api, version, {"preset": "nano"}, "nightly-1") == runs.Submitted(first.run_id, "nightly-1", True)
    kubeflow.finish("nightly-1", "SUCCEEDED")
    assert submit(api, version, {"preset": "nano"}, "nightly-1").adopted
    with pytest.raises(UserError, match=r"--name nightly-1: run .* has this name and does something else"):
        submit(api, version, {"preset": "tiny"}, "nightly-1")
    kubeflow.finish("nightly-1", "FAILED")
    again = submit(api, version, {"preset": "nano"}, "nightly-1")
    assert not again.adopted
    assert again.run_id != first.run_id
    assert submit(api, version, {"preset": "nano"}, "nightly-1").run_id == again.run_id


def task(name: str, state: str, **more: Any) -> dict[str, Any]:
    return {"display_name": name, "state": state, **more}


def test_watch_tells_what_changes_and_how_it_ends(
    api: PipelinesApi, kubeflow: fake.Kubeflow, version: Any, rendering: Rendering
) -> None:
    run_id = submit(api, version, {}, None).run_id
    times = {"start_time": "2026-01-01T00:00:00Z", "end_time": "2026-01-01T00:02:05Z"}
    steps: list[tuple[str, list[dict[str, Any]]]] = [
        ("RUNNING", [task("root", "RUNNING"), task("corpus-driver", "SUCCEEDED"), task("corpus", "RUNNING")]),
        ("RUNNING", [task("corpus", "SUCCEEDED", **times), task("ingest", "RUNNING")]),
        (
            "FAILED",
            [
                task("corpus", "SUCCEEDED", **times),
                task("ingest", "FAILED", error={"message": "no\nspace"}),
                task("report", "SUCCEEDED"),
            ],
        ),
    ]
    row = kubeflow.tables["runs"][run_id]

    def advance() -> None:
        for state, details in steps:
            row.update(state=state, run_details={"task_details": details})
            time.sleep(0.2)

    advance_in_time = threading.Thread(target=advance)
    advance_in_time.start()
    stream = StringIO()
    assert watch(api, run_id, stream) == "FAILED"
    advance_in_time.join()
    assert stream.getvalue().splitlines() == [
        "Snapshot the corpus: running",
        "Snapshot the corpus: done in 2 min 05 s",
        "Normalise, deduplicate, filter, classify: running",
        "Normalise, deduplicate, filter, classify: failed: no space",
        "Report on the run: done",
    ]


def test_watch_survives_an_api_server_that_fails(
    api: PipelinesApi, kubeflow: fake.Kubeflow, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(api, version, {}, None).run_id
    kubeflow.tables["runs"][run_id]["run_details"] = {"task_details": []}
    answers = iter(["PENDING", "fail", "fail", "SUCCEEDED"])
    original = api.run

    def flaky(run: str) -> Any:
        answer = next(answers)
        if answer == "fail":
            kubeflow.failures += [500]
        else:
            kubeflow.tables["runs"][run_id]["state"] = answer
        return original(run)

    monkeypatch.setattr(api, "run", flaky)
    assert watch(api, run_id, StringIO()) == "SUCCEEDED"


def test_watch_gives_up_in_the_end_and_at_once_when_it_may_not(
    api: PipelinesApi, kubeflow: fake.Kubeflow, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(api, version, {}, None).run_id
    states = runs._states(api, run_id)
    assert next(states).state == "PENDING"
    kubeflow.failures += [500] * 100
    monkeypatch.setattr(runs, "PATIENCE_S", 0.1)
    with pytest.raises(StageError, match="500 out of order; the run may still be at work"):
        next(states)
    kubeflow.failures[:] = []
    states = runs._states(api, run_id)
    next(states)
    kubeflow.failures += [403]
    with pytest.raises(ApiError, match="403 out of order; the service account may not do this"):
        next(states)


def test_cancel_is_idempotent(api: PipelinesApi, kubeflow: fake.Kubeflow, version: Any) -> None:
    run_id = submit(api, version, {}, "mine").run_id
    assert cancel(api, run_id) == "PENDING"
    assert cancel(api, run_id) == "CANCELING"
    kubeflow.finish("mine", "CANCELED")
    assert cancel(api, run_id) == "CANCELED"
    assert sum("terminate" in line for line in kubeflow.requests) == 1
    with pytest.raises(UserError, match="run 'nope': there is none on http"):
        cancel(api, "nope")


def test_the_next_run_of_a_series(api: PipelinesApi, kubeflow: fake.Kubeflow, version: Any) -> None:
    submit(api, version, {}, "weekly-by-hand")
    first = submit_next(api, version, {"preset": "nano"}, "weekly", "forbid")
    assert first is not None
    assert submit_next(api, version, {}, "weekly", "forbid") is None
    assert submit_next(api, version, {}, "week", "forbid") is not None
    second = submit_next(api, version, {}, "weekly", "allow")
    third = submit_next(api, version, {}, "weekly", "replace")
    assert second is not None
    assert third is not None
    states = {run["display_name"]: run["state"] for run in kubeflow.rows("runs")}
    assert [states[each.name] for each in (first, second, third)] == ["CANCELING", "CANCELING", "PENDING"]
    assert states["weekly-by-hand"] == "PENDING"
    for each in (first, second, third):
        kubeflow.finish(each.name, "SUCCEEDED")
    assert submit_next(api, version, {}, "weekly", "forbid") is not None
    kubeflow.finish("weekly-by-hand", "SUCCEEDED")
    done = k2("submit", "--series", "weekly")
    assert (done.exit_code, done.stdout) == (0, "a run of weekly is going on; nothing was started\n")
    assert k2("submit", "--series", "weekly", "--name", "x").exit_code == 2


def test_submit_keeps_to_a_budget(store: Store, kubeflow: fake.Kubeflow, tmp_path: Path) -> None:
    document = yaml.safe_load(DEPLOYMENT.read_text())
    for pool in document["pools"].values():
        pool["cost_per_hour"] = 3600.0
    (tmp_path / "priced.yaml").write_text(yaml.safe_dump(document))
    priced = ["--deployment", str(tmp_path / "priced.yaml")]
    assert CliRunner().invoke(main, ["pipeline", "upload", *priced, "--pipeline", "k2"]).exit_code == 0
    write_stage_record(store, "before", {"stage": "rl", "status": "done", "wall_s": 30.0})
    write_stage_record(store, "before", {"stage": "report", "status": "done"})
    over = CliRunner().invoke(main, ["pipeline", "submit", *priced, "--budget", "59"])
    assert over.exit_code == 2
    assert over.stderr.startswith("error: --budget: over budget: 30.00 spent in 30 days and 30.00 for one more run")
    assert not kubeflow.rows("runs")
    within = CliRunner().invoke(main, ["pipeline", "submit", *priced, "--budget", "61", "--budget-days", "7"])
    assert within.exit_code == 0, within.output
    assert len(kubeflow.rows("runs")) == 1
    assert "no pool has a price" in k2("submit", "--budget", "10").stderr


def test_submit_keeps_to_the_deployment_files_budget(
    store: Store, kubeflow: fake.Kubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = yaml.safe_load(DEPLOYMENT.read_text())
    document["budget"] = {"limit": 50, "days": 7}
    for pool in document["pools"].values():
        pool["cost_per_hour"] = 3600.0
    (tmp_path / "priced.yaml").write_text(yaml.safe_dump(document))
    command = ["pipeline", "submit", "--deployment", str(tmp_path / "priced.yaml")]
    assert CliRunner().invoke(main, ["pipeline", "upload", *command[2:], "--pipeline", "k2"]).exit_code == 0
    assert CliRunner().invoke(main, command).exit_code == 0
    write_stage_record(store, "before", {"stage": "rl", "status": "done", "wall_s": 30.0})
    write_stage_record(store, "before", {"stage": "report", "status": "done"})
    over = CliRunner().invoke(main, command)
    assert over.exit_code == 2
    assert over.stderr.startswith("error: budget in the deployment file: over budget: 30.00 spent in 7 days and 30.00")
    assert len(kubeflow.rows("runs")) == 1
    assert CliRunner().invoke(main, [*command, "--budget", "61"]).exit_code == 0
    monkeypatch.delenv("K2_S3_ENDPOINT")
    assert "K2_S3_ENDPOINT is not set" in CliRunner().invoke(main, command).stderr


# Access.


def test_the_token_is_read_again_for_each_request(
    kubeflow: fake.Kubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    kubeflow.tokens = {"first"}
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    api = PipelinesApi(Kubeflow())
    api.check()
    kubeflow.tokens = {"second"}
    with pytest.raises(
        ApiError, match="401 unauthenticated; the token was not accepted; mount one with the audience"
    ) as failure:
        api.versions("x")
    assert "first" not in str(failure.value)
    token.write_text("second\n")
    assert api.versions("x") == []


def test_an_install_for_many_needs_the_namespace_and_gets_it(kubeflow: fake.Kubeflow, rendering: Rendering) -> None:
    kubeflow.multi_user = True
    with pytest.raises(UserError, match=r"kubeflow.multi_user: .* separates profiles; set it to true"):
        PipelinesApi(Kubeflow()).check()
    for namespace in ("team-a", "team-b"):
        api = PipelinesApi(Kubeflow(namespace=namespace, multi_user=True))
        api.check()
        assert upload(api, [altered(rendering, hash(namespace))], "")[0].new
        submit(api, find_version(api, "k2", None), {}, "mine")
        assert [run.display_name for run in api.runs()] == ["mine"]
    assert {row["namespace"] for row in kubeflow.rows("pipelines")} == {"team-a", "team-b"}
    kubeflow.multi_user = False
    with pytest.raises(UserError, match="has one namespace for all; set it to false"):
        api.check()


def test_the_upload_s_own_form_of_errors_is_understood(
    api: PipelinesApi, kubeflow: fake.Kubeflow, rendering: Rendering
) -> None:
    with pytest.raises(ApiError, match="404 pipelines nope not found"):
        api.upload_version("nope", rendering, "")


def test_reads_are_retried_and_writes_are_not(api: PipelinesApi, kubeflow: fake.Kubeflow) -> None:
    kubeflow.failures += [503, 503]
    assert api.versions("x") == []
    kubeflow.failures += [503]
    with pytest.raises(ApiError, match="503 out of order"):
        api.create_pipeline("k2", "")
    assert kubeflow.rows("pipelines") == []


def test_an_unreachable_server_is_named_with_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"kubeflow.endpoint: http://127.0.0.1:9 is unreachable .*port-forward"):
        PipelinesApi(Kubeflow()).check()


def test_a_server_that_is_something_else_is_refused(kubeflow: fake.Kubeflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"{kubeflow.url}/other")
    with pytest.raises(UserError, match=r"kubeflow.endpoint: .*/other: 404 no route"):
        PipelinesApi(Kubeflow()).check()


def test_proxy_and_ca_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from k2.platform.api import _configuration

    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "/ca.crt")
    assert _configuration("https://outside.example").proxy == "http://proxy:3128"
    assert _configuration("https://outside.example").ssl_ca_cert == "/ca.crt"
    assert _configuration("https://inside.example").proxy is None


# The command line.


def test_from_nothing_to_a_finished_run(kubeflow: fake.Kubeflow) -> None:
    assert k2("upload", "--pipeline", "k2").output.endswith(": uploaded\n")
    assert k2("upload", "--pipeline", "k2").output.endswith(": there already\n")
    started = k2("submit", "--param", "preset=nano", "--name", "first", "--json")
    run_id = json.loads(started.stdout)["run_id"]
    assert started.exit_code == 0
    ending: Callable[[], None] = lambda: (time.sleep(0.2), kubeflow.finish("first", "SUCCEEDED"))[1]  # noqa: E731
    threading.Thread(target=ending).start()
    followed = k2("submit", "--param", "preset=nano", "--name", "first", "--watch")
    assert (followed.exit_code, followed.stdout) == (0, "succeeded\n")
    assert "adopted: first" in followed.stderr
    kubeflow.finish("first", "FAILED")
    assert k2("watch", run_id).exit_code == 1
    assert k2("cancel", run_id, "--wait").stdout == "failed\n"
    other = json.loads(k2("submit", "--name", "second", "--json").stdout)["run_id"]
    assert k2("cancel", other).stdout == "canceling\n"
    assert k2("prune", "--keep", "1").stdout == "nothing to remove\n"


def test_wrong_use_is_one_line_and_exit_code_2(
    kubeflow: fake.Kubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["submit"], ["watch", "nope"], ["submit", "--param", "x"]):
        done = k2(*arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    broken = yaml.safe_load(DEPLOYMENT.read_text()) | {"stages": {"pretrain": "gpu"}}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(broken))
    before = len(kubeflow.requests)
    done = CliRunner().invoke(main, ["pipeline", "upload", "--deployment", str(tmp_path / "d.yaml")])
    assert done.exit_code == 2
    assert "stages.pretrain: there is no pool 'gpu'" in done.stderr
    assert len(kubeflow.requests) == before
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:9")
    assert k2("upload", "--pipeline", "k2").exit_code == 2
