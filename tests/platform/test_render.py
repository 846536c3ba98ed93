"""Compiled pipelines: what a cluster is asked to run."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from k2.ablations.component import resolve
from k2.cli import main
from k2.config.deployment import Deployment, Placement
from k2.config.quantity import amount
from k2.errors import UserError
from k2.execution.component import resolve_config
from k2.execution.registry import STAGES
from k2.launch.app import application
from k2.launch.backend import Terms
from k2.launch.indexed_job import IndexedJob
from k2.platform.needs import of_deployment
from k2.platform.pods import LAUNCH_VARIABLE, NEEDS_VARIABLE, PRESET_VARIABLE, environment, labels
from k2.platform.render import MAX_BYTES, PIPELINES, RECIPES, Rendering, render, spec_digest
from pipelines.ablations.qk_clip import STUDY

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "pipelines" / "compiled"
COMPILE = ["pipeline", "compile", "--deployment", str(ROOT / "pipelines/deployments/gpu.yaml"), "--revision", "0" * 40]


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def deployment(request: pytest.FixtureRequest) -> Deployment:
    value: Deployment = request.getfixturevalue(request.param)
    return value


@pytest.fixture(scope="module", params=RECIPES)
def rendering(request: pytest.FixtureRequest, deployment: Deployment) -> Rendering:
    return render(request.param, deployment)


def tasks(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task of every group, the exit task and the groups themselves included."""
    if isinstance(node, dict):
        yield from node.get("dag", {}).get("tasks", {}).items()
        for value in node.values():
            yield from tasks(value)


def placed(rendering: Rendering) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Task name, container and platform settings of every container that runs."""
    settings = rendering.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in rendering.spec["deploymentSpec"]["executors"].items():
        yield name.removeprefix("exec-"), executor["container"], settings[name]


def test_every_stage_is_a_task(rendering: Rendering) -> None:
    found = {name for name, _ in tasks(rendering.spec)}
    assert {*STAGES, "configure"} <= found
    assert ("guard" in found) == (rendering.pipeline == "k2-retrain")


def test_kfp_s_cache_is_off_on_every_task(rendering: Rendering) -> None:
    found = list(tasks(rendering.spec))
    assert "report" in dict(found)
    assert "exit-handler-1" in dict(found)
    for name, task in found:
        assert not task.get("cachingOptions"), name


def test_every_task_reads_well(rendering: Rendering) -> None:
    names = [task["taskInfo"]["name"] for name, task in tasks(rendering.spec) if name != "exit-handler-1"]
    assert all(name[0].isupper() and " " in name for name in names), names


def test_artifacts_are_of_the_types_that_the_ui_shows(rendering: Rendering) -> None:
    outputs = [each.get("outputDefinitions", {}) for each in rendering.spec["components"].values()]
    shown = {kind["artifactType"]["schemaTitle"] for each in outputs for kind in each.get("artifacts", {}).values()}
    assert shown >= {f"system.{kind}" for kind in ("Metrics", "HTML", "Markdown", "ClassificationMetrics")}


def test_parameters_are_few_typed_and_described(rendering: Rendering) -> None:
    parameters = rendering.spec["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 6
    for name, parameter in parameters.items():
        assert parameter["parameterType"] in ("STRING", "BOOLEAN", "NUMBER_DOUBLE", "NUMBER_INTEGER"), name
        assert len(parameter["description"]) > 20, name
        assert "defaultValue" in parameter, name


def test_containers_are_what_the_deployment_says(rendering: Rendering, deployment: Deployment) -> None:
    for name, container, settings in placed(rendering):
        work = deployment.placement(name)
        env = {each["name"]: each["value"] for each in container["env"]}
        launched = work.pool.launch != "pod"
        pool = deployment.pools[deployment.default_pool] if launched else work.pool
        assert container["image"] == deployment.images[pool.image], name
        assert "@sha256:" in container["image"]
        size = container["resources"]
        assert size["resourceCpuRequest"] == size["resourceCpuLimit"] == pool.cpu
        assert size["resourceMemoryRequest"] == size["resourceMemoryLimit"]
        assert amount(size["resourceMemoryLimit"]) == pool.memory_bytes()
        assert "accelerator" not in size, name
        waits = work.queue_timeout_s + 600 if launched else 0
        assert int(settings["activeDeadlineSeconds"]) == work.timeout_s + waits
        assert (LAUNCH_VARIABLE in env) == launched
        if launched:
            assert Placement.model_validate_json(env[LAUNCH_VARIABLE]) == work
        else:
            jobs = {"K2_JOBS": "job,trainjob"} if name == "report" and deployment.job_kinds() else {}
            needs = {NEEDS_VARIABLE: of_deployment(deployment).model_dump_json(exclude_defaults=True)}
            assert env == environment(work) | jobs | (needs if name == "configure" else {})
            assert settings["podMetadata"]["labels"] == labels(work) | {"k2.dev/run": "{{workflow.name}}"}


def test_pods_know_the_peak_of_what_they_train_on_if_the_deployment_says_it(gpu: Deployment) -> None:
    work = gpu.placement("pretrain")
    assert "K2_PEAK_FLOPS" not in environment(work)
    accelerator = work.pool.accelerator
    assert accelerator is not None
    told = work.pool.model_copy(
        update={"accelerator": accelerator.model_copy(update={"peak_tflops": 989.0}), "nodes": 4}
    )
    variables = environment(work.model_copy(update={"pool": told}))
    assert float(variables["K2_PEAK_FLOPS"]) == 989e12 * accelerator.count * 4


def test_every_container_is_as_restricted_as_kfp_allows(rendering: Rendering, deployment: Deployment) -> None:
    for name, _, settings in placed(rendering):
        context = settings["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert int(context["runAsUser"]) == deployment.identity.user
        pulls = [secret["secretName"] for secret in settings.get("imagePullSecret", ())]
        assert pulls == list(deployment.pull_secrets)


def test_secrets_come_by_name_only(rendering: Rendering, deployment: Deployment) -> None:
    for name, container, settings in placed(rendering):
        named = {secret["secretName"] for secret in settings["secretAsEnv"]}
        assert named - {"llm-endpoint"} == {"k2-s3"}
        # Without its Secret a pod never starts; these two do, and say so.
        optional = name in ("configure", "report")
        assert all(secret.get("optional", False) is optional for secret in settings["secretAsEnv"]), name
        assert ("llm-endpoint" in named) == (bool(deployment.secrets) and name in ("rephrase", "synthesize"))
        assert not {each["name"] for each in container["env"]} & {"K2_S3_SECRET_KEY", "K2_LLM_API_KEY"}


def test_labels_say_who_pays(gpu: Deployment) -> None:
    for name, _, settings in placed(render("k2", gpu)):
        found = settings["podMetadata"]["labels"]
        wanted = {"k2.dev/team": "ml-platform", "k2.dev/cost-center": "4711", "k2.dev/stage": name}
        assert found.items() >= wanted.items()
        assert found["sidecar.istio.io/inject"] == "false"


def test_every_step_has_its_runs_label_and_a_pinned_preset(rendering: Rendering, gpu: Deployment) -> None:
    """Argo fills in the run; the preset is constant only where the deployment allows no other, and then it is true."""
    for name, _, settings in placed(rendering):
        assert settings["podMetadata"]["labels"]["k2.dev/run"] == "{{workflow.name}}", name
        assert "k2.dev/preset" not in settings["podMetadata"]["labels"]
    pinned = render("k2", gpu.model_copy(update={"preset": "small"}))
    assert pinned.spec["root"]["inputDefinitions"]["parameters"]["preset"]["defaultValue"] == "small"
    for name, container, settings in placed(pinned):
        assert settings["podMetadata"]["labels"]["k2.dev/preset"] == "small"
        told = {each["value"] for each in container["env"] if each["name"] == PRESET_VARIABLE}
        assert told == ({"small"} if name == "configure" else set())


def test_argo_fills_in_the_runs_label_and_nothing_else(rendering: Rendering) -> None:
    """It fills in whatever looks like this, of all that it is handed; what begins with a dollar is KFP's own."""
    text = rendering.ir()
    kfp = {"{{$}}", "{{$.pipeline_job_name}}"}
    assert set(re.findall(r"\{\{[^}]*\}\}", text)) - kfp == {"{{workflow.name}}"}
    assert text.count("{{workflow.name}}") == len(list(placed(rendering)))


def test_a_pinned_preset_refuses_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(PRESET_VARIABLE, "tiny")
    assert json.loads(resolve_config("tiny", "", "x"))["preset"] == "tiny"
    with pytest.raises(SystemExit) as end:
        resolve_config("nano", "", "x")
    assert end.value.code == 2
    assert "preset: 'nano' is not 'tiny', the only one that the deployment file allows" in capsys.readouterr().err


def test_a_pinned_preset_refuses_others_of_a_study_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PRESET_VARIABLE, "tiny")
    with pytest.raises(SystemExit) as end:
        resolve(STUDY.model_dump_json(), "nano", "", "x")
    assert end.value.code == 2
    assert "preset: 'nano' is not 'tiny'" in capsys.readouterr().err


def test_a_step_never_waits_for_an_accelerator_and_its_job_gets_slice_shm_and_taint(gpu: Deployment) -> None:
    """The lookup of the result runs on CPU: a stage that is there already schedules no pod with a GPU."""
    for name, container, _ in placed(render("k2", gpu)):
        assert "accelerator" not in container["resources"], name
        launches = LAUNCH_VARIABLE in {each["name"] for each in container["env"]}
        assert launches == (gpu.placement(name).pool.accelerator is not None), name
    job = IndexedJob().job(application("x", gpu.placement("evaluate"), ["k2.launch.rank", "w"]), Terms("ml"))
    pod = job["spec"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == "1"
    assert limits["memory"] == f"{(32 + 8) * 1024}Mi"
    assert {"name": "k2-shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    assert pod["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]


def test_scratch_of_each_kind_the_ca_and_the_proxy_arrive(gpu: Deployment) -> None:
    scratch = gpu.pools["data"].scratch.model_copy(update={"storage_class": None, "claim": "disk"})
    pools = dict(gpu.pools) | {"data": gpu.pools["data"].model_copy(update={"scratch": scratch})}
    network = gpu.network.model_copy(update={"https_proxy": "http://proxy:3128"})
    claimed = render("k2", gpu.model_copy(update={"pools": pools, "network": network}))
    found = {name: (c, s) for name, c, s in placed(claimed)}
    assert found["corpus"][1]["pvcMount"][0]["pvcNameParameter"]["runtimeValue"]["constant"] == "disk"
    assert {v["mountPath"] for v in found["gate"][1]["emptyDirMounts"]} == {"/scratch"}
    env = {each["name"]: each["value"] for each in found["gate"][0]["env"]}
    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert "HTTP_PROXY" not in env
    assert env["K2_S3_CA"] == env["SSL_CERT_FILE"] == "/etc/k2/ca/ca.crt"
    volume = next(s for name, _, s in placed(render("k2", gpu)) if name == "corpus")["genericEphemeralVolume"]
    assert volume[0]["storageClassName"] == "local-nvme"


def test_identity_can_be_left_to_the_cluster(cpu: Deployment) -> None:
    anyone = cpu.model_copy(update={"identity": cpu.identity.model_copy(update={"user": None, "group": None})})
    for _, _, settings in placed(render("k2", anyone)):
        assert settings["securityContext"] == {"runAsNonRoot": True}


def test_workload_identity_needs_no_keys(cpu: Deployment) -> None:
    store = cpu.store.model_copy(update={"workload_identity": True})
    for _, _, settings in placed(render("k2", cpu.model_copy(update={"store": store}))):
        keys = {key["secretKey"] for key in settings["secretAsEnv"][0]["keyToEnv"]}
        assert keys == {"K2_S3_ENDPOINT", "K2_S3_BUCKET", "K2_S3_PREFIX"}


def test_a_run_has_a_deadline_and_its_pods_stay_for_their_logs(rendering: Rendering) -> None:
    config = json.dumps(rendering.platform)
    assert '"activeDeadlineSeconds": 1209600' in config
    assert "259200" in config


def test_the_guard_knows_the_prices_and_comes_before_the_recipe(gpu: Deployment) -> None:
    found = dict(tasks(render("k2-retrain", gpu).spec))
    costs = found["guard"]["inputs"]["parameters"]["costs"]["runtimeValue"]["constant"]
    assert json.loads(costs) == gpu.costs()
    condition = found["condition-2"]
    assert "guard" in condition["dependentTasks"]
    assert found["guard"]["dependentTasks"] == ["configure"]
    assert "== 'yes'" in condition["triggerPolicy"]["condition"]


def test_no_package_is_installed_at_run_time(rendering: Rendering) -> None:
    for _, container, _ in placed(rendering):
        assert "pip install" not in " ".join(container["command"])


def test_sizes(rendering: Rendering) -> None:
    assert len(rendering.ir().encode()) <= MAX_BYTES
    assert len(rendering.resources("kubeflow", "0" * 40).encode()) <= MAX_BYTES


def test_the_version_is_named_by_all_of_both_specs(gpu: Deployment, cpu: Deployment) -> None:
    rendered = render("k2", gpu)
    assert rendered.version == f"k2-{spec_digest(rendered.spec, rendered.platform)[:12]}"
    assert rendered.version == render("k2", gpu).version
    other = gpu.model_copy(update={"pull_secrets": ("other",)})
    assert len({rendered.version, render("k2", other).version, render("k2", cpu).version}) == 3
    assert spec_digest({"a": 1}, {}) == spec_digest({"a": 1.0}, {}) != spec_digest({"a": 2}, {})


def test_resources_are_kept_by_gitops_and_carry_the_commit(gpu: Deployment) -> None:
    pipeline, version = yaml.safe_load_all(render("k2", gpu).resources("team-a", "abc"))
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    waves = [each["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"] for each in (pipeline, version)]
    assert waves == ["0", "1"]
    for each in (pipeline, version):
        assert each["metadata"]["annotations"]["argocd.argoproj.io/sync-options"] == "Prune=false,ServerSideApply=true"
        assert each["metadata"]["namespace"] == "team-a"
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "k2"
    assert version["spec"]["tags"]["k2-revision"] == "abc"
    assert (
        version["metadata"]["name"] == version["spec"]["displayName"] == f"k2-{version['spec']['tags']['k2-spec'][:12]}"
    )


def test_kfp_reads_what_was_written(rendering: Rendering, tmp_path: Path) -> None:
    from kfp import components

    (tmp_path / "k2.yaml").write_text(rendering.ir())
    loaded = components.load_component_from_file(str(tmp_path / "k2.yaml"))
    assert loaded.component_spec.name == rendering.pipeline


def test_compiled_pipelines_are_up_to_date(tmp_path: Path) -> None:
    """`make compile` writes them; another process with another hash seed writes the same bytes."""
    subprocess.run(
        [sys.executable, "-m", "k2.cli", *COMPILE, "--out", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}/src:{ROOT}", "PYTHONHASHSEED": "7"},
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in COMPILED.iterdir())
    for name in names:
        assert (tmp_path / name).read_text() == (COMPILED / name).read_text(), f"{name}: run `make compile`"


def test_compile_says_what_it_wrote(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*COMPILE, "--out", str(tmp_path), "--pipeline", "k2", "--json"])
    assert done.exit_code == 0, done.output
    version = json.loads(done.output)["k2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2.resources.yaml", "k2.yaml"]
    assert version in (tmp_path / "k2.resources.yaml").read_text()


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - set(RECIPES)))
def test_studies_are_placed_too(name: str, gpu: Deployment) -> None:
    """Every training of a study runs where pretraining does."""
    rendered = render(name, gpu)
    assert len(rendered.ir().encode()) <= MAX_BYTES
    assert not [task for task, spec in tasks(rendered.spec) if spec.get("cachingOptions")]
    for task, container, settings in placed(rendered):
        assert container["image"] == gpu.images["cpu"], task
        assert settings["securityContext"]["runAsNonRoot"] is True
        launched = LAUNCH_VARIABLE in {each["name"] for each in container["env"]}
        assert launched == (task.startswith("arm") or task == "rephrase"), task


def test_before_2_17_the_limits_of_a_whole_run_are_left_out(cpu: Deployment) -> None:
    timeouts = cpu.timeouts.model_copy(update={"run_hours": None, "keep_hours": None})
    old = render("k2", cpu.model_copy(update={"timeouts": timeouts}))
    assert "pipelineConfig" not in json.dumps(old.platform)


def test_tags_fit_kubeflow_s_limits(gpu: Deployment) -> None:
    tags = render("k2", gpu).tags("0" * 40)
    assert all("." not in key and len(key) <= 63 and len(value) <= 63 for key, value in tags.items())
    with pytest.raises(UserError, match="--revision: 64 characters, over 63"):
        render("k2", gpu).tags("0" * 64)


def test_an_unknown_pipeline_and_one_that_is_too_large_are_refused(gpu: Deployment) -> None:
    with pytest.raises(
        UserError, match="pipeline 'k3': there is none; the pipelines are k2, k2-retrain, ablation-heads"
    ):
        render("k3", gpu)
    with pytest.raises(UserError, match="over 204800"):
        Rendering("k2", "", {"x": "a" * MAX_BYTES}, {}).ir()
