"""Grafana dashboards, one subject each, rendered from the table below.

    python manifests/dashboards.py        write charts/k2/files/monitoring/dashboards/*.json

Every query is checked against the metrics that exist, and by promtool; a rendering that differs from the committed one
fails a test.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "charts" / "k2" / "files" / "monitoring" / "dashboards"
RUN = 'run=~"$run",stage=~"$stage"'
RATE = "[$__rate_interval]"
PANEL_WIDTH, PANEL_HEIGHT, ROW_WIDTH = 12, 8, 24
TEAM_RUN = "label_k2_dev_team, label_k2_dev_run"


@dataclass(frozen=True)
class Panel:
    """A graph: its queries with their legends, its unit in Grafana's words, and what to read from it."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str
    kind: str = "timeseries"


@dataclass(frozen=True)
class Dashboard:
    """A page of panels about one subject."""

    title: str
    panels: tuple[Panel, ...]


def rate(counter: str, by: str = "run, stage") -> str:
    """A counter's increase per second."""
    return f"sum by ({by}) (rate({counter}{{{RUN}}}{RATE}))"


def share(part: str, other: str) -> str:
    """One counter's share of two, over half an hour."""
    parts = [f"sum by (run) (increase({name}{{{RUN}}}[30m]))" for name in (part, other)]
    return f"{parts[0]} / ({parts[0]} + {parts[1]})"


def _slowest(histogram: str) -> str:
    """The 95th percentile of each model."""
    return f"histogram_quantile(0.95, sum by (model, le) (rate({histogram}_bucket[5m])))"


DASHBOARDS = {
    "training": Dashboard(
        "Training stability",
        (
            Panel(
                "Loss",
                "none",
                {
                    "{{run}} {{stage}}": f"k2_loss{{{RUN}}}",
                    "{{run}} {{stage}} mean of 30 min": f"avg_over_time(k2_loss{{{RUN}}}[30m])",
                },
                "A spike that does not come back within the mean's half hour is what the alert K2LossSpike is about.",
            ),
            Panel(
                "Largest attention logit against tau",
                "none",
                {
                    "layer {{layer}}": f'k2_attention_logit_max{{{RUN},layer!="all"}}',
                    "tau": f"max(k2_attention_logit_allowed_max{{{RUN}}})",
                },
                "QK-Clip rescales a head above tau, so a line may touch tau and must not leave it behind.",
            ),
            Panel(
                "Heads rescaled by QK-Clip, per second",
                "none",
                {"{{run}} {{stage}}": rate("k2_qk_clip_total")},
                "Frequent early, rare later (the paper's figure 2); rising again means that logits grow.",
            ),
            Panel(
                "Loss spikes and updates skipped, per second",
                "none",
                {
                    "{{run}} {{stage}} skipped": rate("k2_skipped_updates_total"),
                    "{{run}} {{stage}} spikes": rate("k2_loss_spikes_total"),
                },
                "Gradients that were not finite, or a loss spike. Many in a row end the stage.",
            ),
            Panel(
                "Smallest factor of QK-Clip",
                "none",
                {"layer {{layer}}": f"k2_qk_clip_gamma_ratio{{{RUN}}}"},
                "1 where no head is above tau; far below 1, logits outrun the clipping.",
            ),
            Panel(
                "Largest spectral norm of the heads' projections",
                "none",
                {"{{run}} {{projection}}": f"k2_spectral_norm_max{{{RUN}}}"},
                "What logits grow from: QK-Clip holds it where `spectral_interval` measures it.",
            ),
            Panel(
                "Gradient norm and update RMS",
                "none",
                {
                    "{{run}} {{stage}} gradient": f"k2_gradient_norm{{{RUN}}}",
                    "{{run}} {{stage}} update": f"k2_update_rms{{{RUN}}}",
                },
                "The update's RMS stays near 0.2 while gradients are of full rank.",
            ),
            Panel("Learning rate", "none", {"{{run}} {{stage}}": f"k2_learning_rate{{{RUN}}}"}, "The schedule as run."),
            Panel(
                "Age of the last checkpoint",
                "s",
                {"{{run}} {{stage}}": f"time() - k2_checkpoint_timestamp_seconds{{{RUN}}}"},
                "What would be lost if every node went away now.",
            ),
        ),
    ),
    "experts": Dashboard(
        "Mixture of experts",
        (
            Panel(
                "Busiest expert over the mean",
                "none",
                {"layer {{layer}}": f"k2_expert_load_imbalance_ratio{{{RUN}}}"},
                "1 is balance. The selection bias should pull every layer down within some hundred steps.",
            ),
            Panel(
                "Idlest expert over the mean",
                "percentunit",
                {"layer {{layer}}": f"k2_expert_load_floor_ratio{{{RUN}}}"},
                "0 is an expert that no token reaches.",
            ),
            Panel(
                "Worst layer now",
                "none",
                {"{{run}} {{stage}}": f"max by (run, stage) (k2_expert_load_imbalance_ratio{{{RUN}}})"},
                "The slowest expert-parallel rank waits for this one.",
                "stat",
            ),
        ),
    ),
    "throughput": Dashboard(
        "Throughput and MFU",
        (
            Panel("Tokens per second", "none", {"{{run}} {{stage}}": f"k2_tokens_per_second{{{RUN}}}"}, "Trained on."),
            Panel(
                "Model FLOP utilisation",
                "percentunit",
                {"{{run}} {{stage}}": f"k2_mfu_ratio{{{RUN}}}"},
                "Useful FLOP/s over the accelerators' peak; recomputation does not count as useful.",
            ),
            Panel("Tokens so far", "short", {"{{run}} {{stage}}": f"k2_tokens_total{{{RUN}}}"}, "Falls never."),
            Panel(
                "Progress",
                "percentunit",
                {"{{run}} {{stage}}": f"k2_stage_progress_ratio{{{RUN}}}"},
                "Share of the stage's current phase.",
            ),
            Panel(
                "Time in the stage",
                "s",
                {"{{run}} {{stage}}": f"k2_stage_duration_seconds{{{RUN}}}"},
                "Wall time of this attempt.",
            ),
            Panel(
                "Stages found done already",
                "none",
                {"{{run}} {{stage}}": f"k2_cache_hits_total{{{RUN}}}"},
                "A hit asked for no accelerator.",
            ),
        ),
    ),
    "data": Dashboard(
        "Data and rephrasing",
        (
            Panel(
                "Rephrasing: share accepted over 30 min",
                "percentunit",
                {"{{run}}": share("k2_rephrase_accepted_total", "k2_rephrase_rejected_total")},
                "Under 30 % the rewriter says something else than its source; see the runbook.",
            ),
            Panel(
                "Chunks checked, per second",
                "none",
                {
                    "accepted": rate("k2_rephrase_accepted_total", "run"),
                    "rejected": rate("k2_rephrase_rejected_total", "run"),
                },
                "What the rewriter and the fidelity check get through.",
            ),
            Panel(
                "Progress of the data stages",
                "percentunit",
                {"{{stage}}": 'k2_stage_progress_ratio{run=~"$run",stage=~"corpus|ingest|rephrase|tokenize"}'},
                "Share of each stage's current phase.",
            ),
        ),
    ),
    "synthesis": Dashboard(
        "Synthesis of agentic data",
        (
            Panel(
                "Trajectories: share the judge accepts, over 30 min",
                "percentunit",
                {"{{run}}": share("k2_trajectories_accepted_total", "k2_trajectories_rejected_total")},
                "Under 30 % agents, tools or rubrics do not fit each other.",
            ),
            Panel(
                "Trajectories judged, per second",
                "none",
                {
                    "accepted": rate("k2_trajectories_accepted_total", "run"),
                    "rejected": rate("k2_trajectories_rejected_total", "run"),
                },
                "Both together are the simulator's speed.",
            ),
        ),
    ),
    "rl": Dashboard(
        "Reinforcement learning",
        (
            Panel("Reward", "none", {"{{run}}": f"k2_reward{{{RUN}}}"}, "Mean of the last step's rollouts."),
            Panel(
                "Accuracy on verifiable tasks",
                "percentunit",
                {"{{run}} {{stage}}": f"k2_accuracy_ratio{{{RUN}}}"},
                "Reward that rises while this stands still is reward hacking.",
            ),
            Panel(
                "Critic's agreement with verifiers",
                "percentunit",
                {"{{run}}": f"k2_critic_agreement_ratio{{{RUN}}}"},
                "Under 70 % its rubric rewards are not to be trusted.",
            ),
            Panel("Tokens per second", "none", {"{{run}}": 'k2_tokens_per_second{run=~"$run",stage="rl"}'}, "Trained."),
        ),
    ),
    "serving": Dashboard(
        "Serving",
        (
            Panel(
                "Requests per second",
                "reqps",
                {"{{model}} {{status}}": "sum by (model, status) (rate(k2_serve_requests_total[5m]))"},
                "429 is too many at once, 503 a model that cannot answer any more.",
            ),
            Panel(
                "Tokens per second",
                "none",
                {"{{model}} {{kind}}": "sum by (model, kind) (rate(k2_serve_tokens_total[5m]))"},
                "Read from prompts, written in answers.",
            ),
            Panel(
                "Questions open and waiting",
                "none",
                {
                    "{{model}} open": "sum by (model) (k2_serve_open_questions)",
                    "{{model}} waiting": "sum by (model) (k2_serve_waiting_questions)",
                },
                "The batch has `--rows` places; whoever waits has no token yet.",
            ),
            Panel(
                "First token, 95th percentile",
                "s",
                {"{{model}}": _slowest("k2_serve_first_token_seconds")},
                "From the question: queue and prompt.",
            ),
            Panel(
                "Whole answer, 95th percentile",
                "s",
                {"{{model}}": _slowest("k2_serve_answer_seconds")},
                "From the question to the end of its answers.",
            ),
        ),
    ),
    "cost": Dashboard(
        "Queue and cost",
        (
            Panel(
                "Jobs waiting for quota",
                "none",
                {"{{cluster_queue}} {{status}}": 'kueue_pending_workloads{cluster_queue=~"k2-.*"}'},
                "`inadmissible` waits for quota that does not exist: check the job's resources.",
            ),
            Panel(
                "Jobs admitted",
                "none",
                {"{{cluster_queue}}": 'kueue_admitted_active_workloads{cluster_queue=~"k2-.*"}'},
                "Admitted and not finished.",
            ),
            Panel(
                "Wait for admission, 95th percentile",
                "s",
                {
                    "{{cluster_queue}}": "histogram_quantile(0.95, sum by (cluster_queue, le) (rate("
                    'kueue_admission_wait_time_seconds_bucket{cluster_queue=~"k2-.*"}[1h])))'
                },
                "Over the last hour.",
            ),
            Panel(
                "Quota in use",
                "percentunit",
                {
                    "{{cluster_queue}} {{resource}}": "sum by (cluster_queue, resource) "
                    '(kueue_cluster_queue_resource_usage{cluster_queue=~"k2-.*"}) / sum by (cluster_queue, resource) '
                    '(kueue_cluster_queue_nominal_quota{cluster_queue=~"k2-.*"})'
                },
                "Above 100 % is borrowed from another team's idle quota.",
            ),
            Panel(
                "Accelerators by team and run",
                "none",
                {"{{label_k2_dev_team}} {{label_k2_dev_run}}": "k2:accelerators:team_run"},
                "Of running pods.",
            ),
            Panel(
                "Chargeback: accelerator hours in 30 days",
                "h",
                {
                    "{{label_k2_dev_team}} {{label_k2_dev_run}}": f"sum by ({TEAM_RUN}) "
                    "(sum_over_time(k2:accelerators:team_run[30d])) / 60"
                },
                "One sample a minute, so a sample is a sixtieth of an hour for each accelerator.",
                "table",
            ),
            Panel(
                "Names of runs",
                "none",
                {
                    "{{run}} {{k2_dev_run}} {{k2_dev_preset}}": "count by (run, k2_dev_run, k2_dev_preset) "
                    "(last_over_time(k2_stage_progress_ratio[30d]))"
                },
                "Stages of each run that served metrics. Chargeback has the workflow's name, `k2_dev_run`.",
                "table",
            ),
        ),
    ),
}


def render(name: str, dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard as Grafana imports it."""
    variables = [] if name in ("cost", "serving") else [_variable("run"), _variable("stage")]
    return {
        "uid": f"k2-{name}",
        "title": f"K2 / {dashboard.title}",
        "tags": ["k2"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}, *variables]},
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


def _variable(label: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": f"label_values(k2_stage_progress_ratio, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    left = number * PANEL_WIDTH
    table = panel.kind == "table"
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": query, "legendFormat": legend, "instant": table}
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": left % ROW_WIDTH, "y": left // ROW_WIDTH * PANEL_HEIGHT, "w": PANEL_WIDTH, "h": PANEL_HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [target | ({"format": "table"} if table else {}) for target in targets],
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def text(name: str) -> str:
    """The file of a dashboard."""
    return json.dumps(render(name, DASHBOARDS[name]), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(text(each))
