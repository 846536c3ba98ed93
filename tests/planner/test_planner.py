"""The planner against published figures, against the model's own tables, and against a simulated pipeline."""

import json
import time
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise, product
from math import isclose
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from k2.cli import main
from k2.commands.plan import load_cluster
from k2.config.cluster import Cluster, _leaves
from k2.config.deployment import Deployment
from k2.config.load import load_config
from k2.model.layout import flops_per_token, parameter_counts
from k2.planner.layout import ACTIVATION_SWITCHES, Layout, default_layout, describe, layers_of_chunks, layers_of_rank
from k2.planner.memory import chunk_bytes, in_flight, stage_memory, stage_sizes
from k2.planner.plan import checkpointing, long_context, make_plan, problem, search, sync_seconds, what_if
from k2.planner.report import TIMELINE, helm_values, plan_page, timeline
from k2.planner.time import stage_flops, step_time

K2 = load_config("k2-1t").pretrain
PUBLISHED = replace(default_layout(K2), pp=16, ep=16, offload_optimizer=True)
"""The report's layout on 32 nodes (section 2.4)."""


def cluster(name: str) -> Cluster:
    return Cluster.model_validate(yaml.safe_load(files("k2.planner").joinpath(f"clusters/{name}.yaml").read_text()))


def test_the_published_states_fit_256_gpus_at_about_30_gb() -> None:
    states = [stage_memory(K2, PUBLISHED, stage) for stage in range(16)]
    fullest = max(each.parameters + each.gradients for each in states) / 1e9
    assert 27 <= fullest <= 33
    assert problem(K2, PUBLISHED, cluster("h800-256")) is None


def test_the_published_number_of_steps() -> None:
    assert K2.batch_tokens == 67_108_864
    main_phases = K2.warmup_tokens + K2.stable_tokens + K2.decay_tokens
    assert round(main_phases / K2.batch_tokens, -3) == 231_000


@given(layers=st.integers(1, 9), pp=st.integers(1, 4), virtual=st.integers(1, 3), vocab=st.sampled_from([256, 60_000]))
@settings(max_examples=40)
def test_no_division_of_layers_is_better(layers: int, pp: int, virtual: int, vocab: int) -> None:
    """With the embedding as one layer, and the head as what its weights are of a layer's."""
    assume(pp * virtual <= layers)
    model = load_config("tiny").pretrain.model.model_copy(update={"num_hidden_layers": layers, "vocab_size": vocab})
    parts = layers_of_chunks(model, pp, virtual)
    assert [layer for part in parts for layer in part] == list(range(layers))
    counts, outside = parameter_counts(model), vocab * model.hidden_size
    ends = [1.0] + [0.0] * (pp - 1)
    ends[-1] += outside * layers / (counts.active - 2 * outside)
    ways = (way for way in product(range(virtual, layers + 1), repeat=pp) if sum(way) == layers)
    best = min(max(map(sum, zip(way, ends, strict=True))) for way in ways)
    loads = [sum(len(part) for part in parts[rank::pp]) + end for rank, end in enumerate(ends)]
    assert isclose(max(loads), best)
    for rank in range(pp):
        sizes = [len(part) for part in parts[rank::pp]]
        assert max(sizes) - min(sizes) <= 1
    assert min(len(part) for part in parts) >= 1
    assert pp == 1 or (len(parts[0]) <= len(parts[-pp]) and len(parts[-1]) <= len(parts[pp - 1]))


@pytest.mark.parametrize(
    ("preset", "layout", "bound"),
    [
        ("k2-1t", Layout(pp=16), 1.06),
        ("k2-1t", Layout(pp=16, virtual_stages=2), 1.06),
        ("k2-1t", Layout(pp=8), 1.04),
        ("k2-1t", Layout(pp=13), 1.04),
        ("small", Layout(pp=4), 1.09),
        ("small", Layout(pp=2, virtual_stages=2), 1.06),
    ],
)
def test_pipeline_ranks_have_equal_work_and_fewer_layers_at_the_ends(preset: str, layout: Layout, bound: float) -> None:
    config = load_config(preset).pretrain
    work = [stage_flops(config.model, layout, stage, config.context_length) for stage in range(layout.pp)]
    assert max(work) <= bound * sum(work) / layout.pp
    first, *middle, last = [len(layers_of_rank(config.model, layout, stage)) for stage in range(layout.pp)]
    assert all(last < first < count for count in middle)


@pytest.mark.parametrize("preset", ["tiny", "moonlight-16b", "k2-1t"])
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_stages_hold_the_whole_model_and_do_all_its_work(preset: str, pp: int) -> None:
    model, layout = load_config(preset).pretrain.model, Layout(pp=pp)
    held = [stage_sizes(model, layout, stage) for stage in range(pp)]
    assert sum(part.routed + part.shared + part.adamw for part in held) == parameter_counts(model).total
    work = sum(stage_flops(model, layout, stage, 4096) for stage in range(pp))
    assert isclose(work, flops_per_token(model, 4096), rel_tol=1e-12)


def simulate(pp: int, micro_batches: int, forward: int, backward: int) -> tuple[int, list[int]]:
    """1F1B step by step: the time until all is done, and the most micro-batches in flight on each rank."""
    orders = []
    for rank in range(pp):
        warmup = min(pp - rank - 1, micro_batches)
        steady = [kind for _ in range(micro_batches - warmup) for kind in "FB"]
        orders.append(["F"] * warmup + steady + ["B"] * warmup)
    done: dict[tuple[str, int, int], int] = {}
    clocks, counts = [0] * pp, [[0, 0] for _ in range(pp)]
    flying, most = [0] * pp, [0] * pp
    while any(sum(count) < 2 * micro_batches for count in counts):
        for rank in range(pp):
            position = sum(counts[rank])
            if position == 2 * micro_batches:
                continue
            kind = orders[rank][position]
            number = counts[rank][kind == "B"]
            needs = ("F", rank - 1, number) if kind == "F" else ("B", rank + 1, number)
            outside = not 0 <= needs[1] < pp
            if not outside and needs not in done:
                continue
            start = max(clocks[rank], 0 if outside else done[needs])
            clocks[rank] = done[kind, rank, number] = start + (forward if kind == "F" else backward)
            counts[rank][kind == "B"] += 1
            flying[rank] += 1 if kind == "F" else -1
            most[rank] = max(most[rank], flying[rank])
    return max(clocks), most


@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 3), (2, 4), (4, 4), (4, 16), (8, 9)])
def test_bubble_and_micro_batches_in_flight_are_those_of_a_simulated_pipeline(pp: int, micro_batches: int) -> None:
    forward, backward = 1, 2
    total, most = simulate(pp, micro_batches, forward, backward)
    assert total == (micro_batches + pp - 1) * (forward + backward)
    assert most == [in_flight(Layout(pp=pp), rank, micro_batches) for rank in range(pp)]
    config = load_config("moonlight-16b").pretrain
    layout = Layout(pp=pp, micro_batch_tokens=config.batch_tokens // micro_batches)
    step = step_time(config, layout, cluster("h800-256"))
    count = layout.micro_batches(config.batch_tokens)
    assert isclose(step.bubble / step.compute, (pp - 1) / count)


def test_switches_save_the_memory_they_promise() -> None:
    plain = Layout(pp=16, ep=16)
    kept = [stage_memory(K2, replace(plain, **switches), 4) for switches in ACTIVATION_SWITCHES]
    assert all(after.activations < before.activations for before, after in pairwise(kept[:4]))
    assert all(after.host < before.host for before, after in pairwise(kept[3:]))
    *_, stored, offloaded, _, _ = kept
    assert isclose(offloaded.host, stored.activations, rel_tol=0.01)
    assert not stored.host


@pytest.mark.parametrize("pp", [1, 4])
def test_offloaded_activations_travel_out_and_back_once_for_each_micro_batch(pp: int) -> None:
    config = load_config("moonlight-16b").pretrain
    layout = Layout(pp=pp, micro_batch_tokens=config.context_length, offload_activations=True)
    step = step_time(config, layout, cluster("h800-256"))
    largest = max(sum(chunk.host for chunk in chunk_bytes(config, layout, stage)) for stage in range(pp))
    assert isclose(step.traffic["offload"].bytes, 2 * largest * layout.micro_batches(config.batch_tokens))


def test_masters_and_momentum_are_divided_by_their_replicas() -> None:
    one, four = (stage_memory(K2, Layout(pp=16, ep=16, dp=dp), 4) for dp in (1, 4))
    offloaded = stage_memory(K2, Layout(pp=16, ep=16, dp=4, offload_optimizer=True), 4)
    workspace = offloaded.optimizer
    assert isclose(one.optimizer - workspace, 4 * (four.optimizer - workspace), rel_tol=0.02)
    assert isclose(offloaded.host, four.optimizer - workspace)
    assert (one.parameters, one.gradients) == (four.parameters, four.gradients)


def test_the_checkpoint_interval_loses_the_least() -> None:
    place = cluster("h800-2048")
    place = place.model_copy(update={"storage": place.storage.model_copy(update={"write_gb_s": 1e6})})
    saving = checkpointing(K2, Layout(pp=16, ep=16, dp=8), place, 1.0)

    def lost(interval: float) -> float:
        return saving.stall_s / interval + interval / 2 / saving.mean_time_between_failures_s

    assert lost(saving.interval_s) <= min(lost(0.9 * saving.interval_s), lost(1.1 * saving.interval_s))


def test_the_search_is_fast_and_finds_what_fits() -> None:
    place, started = cluster("h800-2048"), time.process_time()
    plans = search(K2, place)
    assert time.process_time() - started < 5
    assert [plan.step.total for plan in plans] == sorted(plan.step.total for plan in plans)
    for plan in plans:
        assert problem(K2, plan.layout, place) is None
        assert all(stage.gpu <= 75e9 for stage in (*plan.stages, *plan.long_stages))
    assert plans[0].step.total <= make_plan(K2, replace(PUBLISHED, dp=8), place).step.total


def test_the_page_is_self_contained() -> None:
    place = cluster("h800-256")
    plan = make_plan(K2, PUBLISHED, place)
    page = plan_page(plan, place, what_if(K2, plan.layout, place))
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert len(page) < 200_000
    for word in ("stage 15", "Helm values", "half the network", "Llama 3 report", f"{plan.days:.1f}"):
        assert word in page


def test_the_helm_values_are_a_pool_that_a_deployment_takes() -> None:
    place = cluster("h800-256")
    values = yaml.safe_load(helm_values(place))["deployment"]
    shipped = yaml.safe_load((Path(__file__).parents[2] / "pipelines/deployments/cpu.yaml").read_text())
    merged = {name: shipped.get(name, {}) | values[name] for name in ("pools", "queues", "stages")}
    merged["images"] = {"cpu": shipped["images"]["cpu"], "gpu": shipped["images"]["cpu"]}
    pool = Deployment.model_validate(shipped | merged).pools["pretrain"]
    assert pool.accelerator is not None
    assert pool.nodes * pool.accelerator.count == place.gpus


def test_the_helm_values_are_values_of_the_chart(tmp_path: Path) -> None:
    code, out = run("k2-1t", "--cluster", "h800-256", "--top", "1", "--values", str(tmp_path / "pool.yaml"))
    assert code == 0, out
    chart = Path(__file__).parents[2] / "charts/k2"
    schema = json.loads((chart / "values.schema.json").read_text())
    values = yaml.safe_load((tmp_path / "pool.yaml").read_text())
    shipped = yaml.safe_load((chart / "values.yaml").read_text())
    jsonschema.validate(shipped | values, schema)
    values["deployment"]["images"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(shipped | values, schema)


def test_the_timeline_of_every_stage_is_one_step_long() -> None:
    plan = make_plan(K2, PUBLISHED, cluster("h800-256"))
    rows = timeline(plan)
    assert [name for name, _ in rows] == [f"stage {index}" for index in range(16)]
    assert all(isclose(sum(parts), plan.step.total) for _, parts in rows)
    assert all(len(parts) == len(TIMELINE) for _, parts in rows)


def test_every_constant_has_a_source_and_can_be_replaced() -> None:
    place = cluster("h800-256")
    constants = dict(_leaves(place.model_dump(exclude={"sources", "name", "currency"})))
    for path in sorted(constants.keys() - {"gpu.name"}):
        value = constants[path] * 0.75 if isinstance(constants[path], float) else constants[path] + 1
        changed = load_cluster("h800-256", (f"{path}={value}",))
        assert dict(_leaves(changed.model_dump(exclude={"sources"})))[path] == value
        assert changed.sources[path] == "given on the command line"
        assert changed.sources.keys() >= place.sources.keys()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["plan", *arguments])
    return result.exit_code, result.output


def test_the_command_prints_json_and_takes_its_own_layout_back() -> None:
    code, out = run("k2-1t", "--cluster", "h800-256", "--top", "1", "--json")
    assert code == 0
    (best,) = json.loads(out)["plans"]
    layout = Layout(**best["layout"] | {"recompute": tuple(best["layout"]["recompute"])})
    again = run("k2-1t", "--cluster", "h800-256", "--layout", describe(layout), "--json")
    assert json.loads(again[1])["plans"] == [best]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--layout", "pp=16,ep=20"],
            "16 x 20 x 1 = 320, the cluster has 256 GPUs; the nearest",
        ),
        (["--layout", "pp=1,ep=256"], "ep=256 does not divide n_routed_experts=384; the nearest"),
        (["--layout", "pp=16,ep=16,offload_activations=false"], "GB, a GPU has 75.0 to give; the nearest"),
        (["--layout", "tp=2"], "--layout 'tp=2': write name=value; the names are pp, ep"),
        (["--layout", "pp=x"], "--layout pp=x: must be a whole number"),
        (["--layout", "recompute=norms+all"], "recompute=norms+all: 'all' is none of none, layers, norms"),
        (["--layout", "pp=64,ep=4"], "pp=64 x virtual_stages=1 exceed 61 layers; the nearest"),
        (
            ["--layout", "pp=16,ep=16,micro_batch_tokens=5000"],
            "micro_batch_tokens=5000 is no multiple of context_length=4096; the n",
        ),
        (
            ["--layout", "pp=16,ep=16,micro_batch_tokens=12288"],
            "batch_tokens=67108864 is no multiple of ep x dp x micro_batch_tokens = 16 x 1 x 12288 = 196608; the",
        ),
        (
            ["--layout", "pp=16,ep=16,virtual_stages=3,micro_batch_tokens=524288"],
            "virtual_stages=3 needs micro-batches (8) in multiples of pp=16; the nearest",
        ),
        (
            ["--layout", "pp=16,ep=16,offload_optimizer=true", "--cluster-set", "host_memory_gb=500"],
            "of a node's host memory, it has 500; the nearest",
        ),
        (["--cluster-set", "gpu.reserved_gb=80"], "reserved_gb (80) must be less than memory_gb (80)"),
        (["--cluster-set", "nodes=0"], "error: h800-256: nodes: must be at least 1, found 0\n"),
        (["--cluster-set", "nodes=many"], "nodes: must be a whole number, found 'many'"),
        (["--cluster-set", "gpu=5"], "gpu: must be a section of fields, found 5"),
        (["--cluster-set", "gpu.memory_gb=8"], "no layout holds the model on 256 GPUs of 8 GB"),
        (["--cluster-set", "gpu.watts=700"], "gpu.watts: there is no field 'watts' here"),
        (["--cluster-set", "gpu.efficiency=2"], "gpu.efficiency: must be at most 1.0, found 2"),
        (["--cluster", "absent.yaml"], "'absent.yaml': no such file; clusters that come with k2: h800-2048, h800-256"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    code, out = run("k2-1t", "--cluster", "h800-256", *arguments)
    assert code == 2
    assert message in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ("gpu", "memory_gb", "gpu.memory_gb: is missing"),
        ("sources", "storage", "storage.write_gb_s has none"),
    ],
)
def test_a_constant_without_value_or_source_is_named(tmp_path: Path, section: str, field: str, message: str) -> None:
    values = yaml.safe_load(files("k2.planner").joinpath("clusters/h800-256.yaml").read_text())
    del values[section][field]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    code, out = run("k2-1t", "--cluster", str(tmp_path / "mine.yaml"))
    assert code == 2
    assert message in out


def test_a_long_context_that_does_not_fit_gets_switches_or_another_division() -> None:
    layout = Layout(pp=32, ep=16, dp=4, recompute=PUBLISHED.recompute, fp8_storage=True)
    plan = make_plan(K2, layout, cluster("h800-2048"))
    longer = replace(layout, micro_batch_tokens=K2.long_context_length)
    assert plan.long_layout in [replace(longer, **switches) for switches in ACTIVATION_SWITCHES]
    assert problem(long_context(K2), longer, cluster("h800-2048")) is not None
    assert 0 < plan.long_fullest.gpu <= 75e9
    few = make_plan(K2, PUBLISHED, cluster("h800-256"))
    same = replace(PUBLISHED, micro_batch_tokens=K2.long_context_length)
    assert problem(long_context(K2), same, cluster("h800-256")) is not None
    assert problem(long_context(K2), few.long_layout, cluster("h800-256")) is None


def test_weights_reach_all_ranks_within_the_published_half_minute() -> None:
    assert 5 < sync_seconds(K2.model, cluster("h800-256")) < 30
    assert 5 < sync_seconds(K2.model, cluster("h800-2048")) < 30
