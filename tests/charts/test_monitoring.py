"""Dashboards and alerts query metrics that exist, by labels that those have; rules fire when they should."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2.monitoring.metrics import REGISTRY, StageMetrics
from manifests import dashboards
from tests.charts.promql import parse
from tests.manifests.render import ROOT, kustomize, tool

MONITORING = ROOT / "charts" / "k2" / "files" / "monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
TARGET = {"namespace", "pod", "container", "job", "instance", "k2_dev_team", "k2_dev_run", "k2_dev_preset"}
POD = {"namespace", "pod", "uid"}
LABELS = {f"label_k2_dev_{each}" for each in ("team", "project", "cost_center", "run", "preset")} | {
    "label_app_kubernetes_io_part_of"
}
OTHERS = {
    # kube-state-metrics
    "kube_pod_container_resource_requests": POD | {"container", "node", "resource", "unit"},
    "kube_pod_labels": POD | LABELS,
    "kube_pod_status_phase": POD | {"phase"},
    "kube_cronjob_next_schedule_time": {"namespace", "cronjob"},
    "kube_cronjob_spec_suspend": {"namespace", "cronjob"},
    "kube_cronjob_created": {"namespace", "cronjob"},
    "kube_cronjob_status_last_successful_time": {"namespace", "cronjob"},
    # Kueue; the last two with `metrics.enableClusterQueueResources`
    "kueue_pending_workloads": {"cluster_queue", "status"},
    "kueue_admitted_active_workloads": {"cluster_queue"},
    "kueue_admission_wait_time_seconds_bucket": {"cluster_queue", "le"},
    "kueue_cluster_queue_resource_usage": {"cohort", "cluster_queue", "flavor", "resource"},
    "kueue_cluster_queue_nominal_quota": {"cohort", "cluster_queue", "flavor", "resource"},
}


def rules() -> Iterator[dict[str, Any]]:
    for group in RULES["groups"]:
        yield from group["rules"]


def recorded() -> dict[str, set[str]]:
    """Recorded metrics have the labels that their rule's outermost aggregation keeps."""
    found = {}
    for rule in rules():
        if "record" in rule:
            kept = re.match(r"sum by \(([^)]*)\)", rule["expr"])
            assert kept
            found[rule["record"]] = {label.strip() for label in kept[1].split(",")}
    return found


def known() -> dict[str, set[str]]:
    ours = {}
    for collector, names in REGISTRY._collector_to_names.items():
        for metric in names:
            ours[metric] = {*collector._labelnames, *TARGET, *(["le"] if metric.endswith("_bucket") else [])}
    return ours | OTHERS | recorded()


def queries() -> list[str]:
    panels = [panel for each in dashboards.DASHBOARDS.values() for panel in each.panels]
    return [query for panel in panels for query in panel.queries.values()]


@pytest.mark.parametrize("query", [*queries(), *(rule["expr"] for rule in rules())])
def test_every_query_names_metrics_and_labels_that_exist(query: str) -> None:
    metrics = known()
    parsed = parse(query)
    assert parsed.metrics
    for metric, matched in parsed.metrics:
        assert metric in metrics, metric
        assert matched <= metrics[metric], (metric, matched - metrics[metric])
    available = set.union(*(metrics[metric] for metric, _ in parsed.metrics))
    assert parsed.grouped <= available, parsed.grouped - available


@pytest.mark.parametrize(
    ("query", "metrics", "grouped"),
    [
        ('sum by (run, le) (rate(a_b{x="}{",y!~"z"}[5m] offset 1h)) / 2e3', [("a_b", {"x", "y"})], {"run", "le"}),
        ("a:b and on (x) (c == bool 1) * ignoring (q) group_left (w) d", [("a:b", set()), ("c", set()), ("d", set())],
         {"x", "q", "w"}),
        ('label_replace(up{job="a"}, "dst", "$1", "src", "(.+)")', [("up", {"job"})], {"dst", "src"}),
        ("time() - max(k2_x) unless sum(rate(y[$__rate_interval])) by (z)", [("k2_x", set()), ("y", set())], {"z"}),
    ],
)  # fmt: skip
def test_the_parser(query: str, metrics: list[tuple[str, set[str]]], grouped: set[str]) -> None:
    parsed = parse(query)
    assert [(name, set(labels)) for name, labels in parsed.metrics] == metrics
    assert parsed.grouped == grouped


def test_every_metric_of_ours_is_on_a_dashboard_or_in_a_rule() -> None:
    shown = {
        metric for query in [*queries(), *(rule["expr"] for rule in rules())] for metric, _ in parse(query).metrics
    }
    missing = {names[0] for names in REGISTRY._collector_to_names.values() if not set(names) & shown}
    assert not missing


def test_the_committed_dashboards_are_what_the_table_renders() -> None:
    assert {path.stem for path in dashboards.FOLDER.glob("*.json")} == set(dashboards.DASHBOARDS)
    for name in dashboards.DASHBOARDS:
        assert (dashboards.FOLDER / f"{name}.json").read_text() == dashboards.text(name)


def test_kustomize_ships_every_dashboard_for_grafanas_sidecar() -> None:
    maps = [each for each in kustomize("manifests/components/monitoring") if each["kind"] == "ConfigMap"]
    shipped = {key: value for each in maps for key, value in each["data"].items()}
    assert {f"{name}.json": dashboards.text(name) for name in dashboards.DASHBOARDS} == shipped
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in maps)
    panels = [panel["id"] for panel in json.loads(shipped["training.json"])["panels"]]
    assert len(panels) == len(set(panels))


def test_every_alert_has_a_severity_a_summary_and_a_runbook() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert len(alerts) == 10
    for alert, rule in alerts.items():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels." in rule["annotations"]["summary"]
        page = ROOT / rule["annotations"]["runbook"]
        assert f"`{alert}`" in page.read_text()


def test_promtool_accepts_the_rules_and_every_query(tmp_path: Path) -> None:
    as_rules = [{"record": "x", "expr": query.replace("$__rate_interval", "5m")} for query in queries()]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": as_rules}]}))
    for name in ("rules", "queries"):
        check = [tool("promtool"), "check", "rules", "--lint=none", str(tmp_path / f"{name}.yaml")]
        run = subprocess.run(check, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "tests.yaml").write_text((Path(__file__).with_name("rules_test.yaml")).read_text())
    command = [tool("promtool"), "test", "rules", str(tmp_path / "tests.yaml")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_each_alert_has_a_unit_test() -> None:
    document = yaml.safe_load(Path(__file__).with_name("rules_test.yaml").read_text())
    firing = {case["alertname"] for test in document["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert firing == {rule["alert"] for rule in rules() if "alert" in rule}


def test_what_a_stage_reports_reaches_the_metrics_that_alerts_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_PEAK_FLOPS", "1e15")
    stage = StageMetrics("pretrain", "alerts")
    stage.event("phase", {"flops_per_token": 2e11})
    stage.progress(1, 2, 3.0, 2000.0, {"tau": 100.0, "expert_floor": [0.5, 0.0], "critic_agreement": 0.75})
    stage.event("checkpoint", {"step": 1})
    stage.event("skipped_update", {"step": 1})
    labels = {"stage": "pretrain", "run": "alerts"}
    wanted = {
        "k2_attention_logit_allowed_max": 100.0,
        "k2_mfu_ratio": 0.4,
        "k2_critic_agreement_ratio": 0.75,
        "k2_skipped_updates_total": 1.0,
    }
    assert {name: REGISTRY.get_sample_value(name, labels) for name in wanted} == wanted
    assert REGISTRY.get_sample_value("k2_expert_load_floor_ratio", labels | {"layer": "1"}) == 0.0
    for name in ("k2_progress_timestamp_seconds", "k2_checkpoint_timestamp_seconds"):
        assert (REGISTRY.get_sample_value(name, labels) or 0) > 1.7e9
    for collector in list(REGISTRY._collector_to_names):
        collector.clear()
