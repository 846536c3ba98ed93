"""The deployment file: what it accepts, and what its errors say."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from k2.config.deployment import RESUMABLE, STAGE_NAMES, Deployment, Placement
from k2.config.quantity import amount, mebibytes
from k2.errors import UserError
from k2.execution.registry import STAGES
from k2.platform.documents import read_section

DEPLOYMENTS = Path(__file__).parents[2] / "pipelines" / "deployments"


def document() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "gpu.yaml").read_text())
    return value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("stages/pretrain", "gpus", "stages.pretrain: there is no pool 'gpus'; the pools are light, data, gpu, slice"),
        ("stages/pretrian", "gpu", "stages: there is no stage 'pretrian'; the stages are corpus"),
        ("default_pool", "gpu", "default_pool: launchers run there"),
        ("preset", "huge", "preset: 'huge' is unknown; the presets are k2-1t, moonlight-16b"),
        ("pools/gpu/acelerator", {}, "pools.gpu.acelerator: there is no field 'acelerator' here; the fields are image"),
        ("pools/gpu/accelerator/num", 8, "pools.gpu.accelerator.num: there is no field 'num' here; the fields are res"),
        ("pools/gpu/image", "cuda", "pools.gpu.image: there is no image 'cuda'; the images are cpu, gpu"),
        ("pools/gpu/memory", "lots", "pools.gpu.memory: 'lots' is no amount; write it as 500m, 2 or 4Gi"),
        ("pools/gpu/cpu", [2], "pools.gpu.cpu: must be text, found [2]"),
        (
            "pools/gpu/cpu",
            "2Gi",
            "pools.gpu.cpu: '2Gi' does not fit; cpu: CPU of one pod, request and limit, such as 500m",
        ),
        ("pools/gpu/queue", "other", "pools.gpu.queue: the queue 'other' has no quota; add it to queues"),
        ("pools/gpu/nccl/PATH", "/x", "pools.gpu.nccl.PATH"),
        ("pools/gpu/scratch/claim", "disk", "name a claim or a storage_class, not both"),
        ("pools/gpu/launch", "pod", "pools.gpu: a Kubeflow pod cannot have accelerator, rdma, spot, topology, grace_s"),
        ("pools/slice/launch", "pod", "pools.slice: a Kubeflow pod cannot have accelerator; set pools.slice"),
        ("queues/k2-gpu/quota", {}, "queues.k2-gpu.quota"),
        ("queues/k2-gpu/quota/rdma~1hca", None, "queues.k2-gpu.quota: add rdma/hca, which pool gpu asks for"),
        ("queues/k2-gpu/quota/cpu", 8, "queues.k2-gpu.quota.cpu: 8 never admits pool gpu, which asks for 32"),
        ("stages/tokenize", "gpu", "stages.tokenize: gpu is a spot pool and tokenize starts over when its node goes"),
        ("store", None, "store: is missing; store: the object store's Secret"),
        ("store/secret", None, "store.secret: is missing; secret: Secret with K2_S3_ENDPOINT"),
        ("images/cpu", "registry.example/k2:latest", "images.cpu: 'registry.example/k2:latest' does not fit; images:"),
        ("secrets/K2_LLM_API_KEY/stages", ["rewrite"], "secrets.K2_LLM_API_KEY.stages: there is no stage 'rewrite'"),
        ("secrets/K2_LLM_API_KEY/value", "hunter2", "secrets.K2_LLM_API_KEY.value: there is no field 'value' here"),
        ("timeouts/stages", {"x": 1}, "timeouts.stages: there is no stage 'x'"),
        (
            "kubeflow/endpoint",
            "https://me:hunter2@kfp",
            "kubeflow.endpoint: 'https://…@kfp' does not fit; endpoint: URL",
        ),
        ("labels/team", "a team!", "labels.team"),
    ],
)
def test_what_is_wrong_is_named_with_the_fix(path: str, value: Any, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    changed = document() | {"timeouts": {}, "kubeflow": {}}
    *parents, last = [part.replace("~1", "/") for part in path.split("/")]
    node = changed
    for part in parents:
        node = node[part]
    node.pop(last, None) if value is None else node.update({last: value})
    file.write_text(yaml.safe_dump(changed, sort_keys=False))
    with pytest.raises(UserError) as failure:
        read_section(file, Deployment)
    assert expected in str(failure.value)
    assert str(failure.value).startswith(str(file))
    assert "\n" not in str(failure.value)
    assert "hunter2" not in str(failure.value)


def test_a_missing_file_and_no_mapping_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_section(tmp_path / "none.yaml", Deployment)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="expected fields"):
        read_section(tmp_path / "list.yaml", Deployment)


def test_the_stages_are_the_registry_s() -> None:
    assert set(STAGE_NAMES) == set(STAGES)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_resumable_stages_are_those_that_publish_their_state(stage: str) -> None:
    source = Path(__file__).parents[2] / "src" / "k2" / "stages" / f"{stage}.py"
    assert ("output.work" in source.read_text()) == (stage in RESUMABLE)


def test_shm_counts_as_memory(gpu: Deployment) -> None:
    assert gpu.pools["gpu"].memory_bytes() == (384 + 64) * 2**30
    assert gpu.pools["gpu"].requests()["memory"] == (384 + 64) * 2**30


def test_a_placement_survives_json_and_has_only_its_stage_s_secrets(gpu: Deployment) -> None:
    for stage in STAGE_NAMES:
        placement = gpu.placement(stage)
        text = placement.model_dump_json(exclude_defaults=True)
        assert Placement.model_validate_json(text) == placement
        assert ("K2_LLM_API_KEY" in placement.secrets) == (stage in ("rephrase", "synthesize"))


def test_costs_are_an_hour_of_all_pods(gpu: Deployment) -> None:
    pools = dict(gpu.pools) | {"gpu": gpu.pools["gpu"].model_copy(update={"nodes": 4})}
    costs = gpu.model_copy(update={"pools": pools}).costs()
    assert costs["pretrain"] == 4 * 24
    assert costs["corpus"] == 1.2
    assert "gate" not in costs


@given(st.integers(1, 10**6), st.sampled_from(["", "m", "k", "M", "G", "Ki", "Mi", "Gi", "Ti"]))
def test_quantities(number: int, unit: str) -> None:
    base = {"": 1, "m": 0.001, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    assert amount(f"{number}{unit}") == pytest.approx(number * base[unit])


@given(st.text(max_size=6).filter(lambda text: "." not in text))
def test_what_is_no_quantity_is_refused(text: str) -> None:
    digits = text.rstrip("mkMGTPi")
    if digits.isascii() and digits.isdigit() and int(digits):
        return
    with pytest.raises(ValueError, match="no amount"):
        amount(text)


@given(st.integers(1, 2**50))
def test_mebibytes_round_up(size: int) -> None:
    assert size <= amount(mebibytes(size)) < size + 2**20
