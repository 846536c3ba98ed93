"""Names, labels and values of the Prometheus metrics, through the exposition format."""

import logging
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from k2.errors import UserError
from k2.monitoring.events import StageProgress, progress_for
from k2.monitoring.metrics import REGISTRY, ServeMetrics, StageMetrics, serve_from_environment
from k2.store.embedded import free_ports

BASE_UNITS = (
    "seconds",
    "ratio",
    "total",
    "loss",
    "learning_rate",
    "reward",
    "per_second",
    "max",
    "clip",
    "norm",
    "rms",
    "questions",
)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


class Nowhere:
    """A sink that takes everything."""

    def append(self, stage: str, kind: str, /, **values: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _own_run(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for collector in list(REGISTRY._collector_to_names):
        collector.clear()


def test_names_have_the_prefix_and_a_base_unit_and_labels_are_bounded() -> None:
    for collector, names in REGISTRY._collector_to_names.items():
        family = names[0]
        assert re.fullmatch(r"k2_[a-z_]+", family)
        assert any(name.endswith(BASE_UNITS) for name in names), names
        of_stages = [("stage", "run", *more) for more in ((), ("layer",), ("projection",))]
        of_models = [("model", *more) for more in ((), ("status",), ("kind",))]
        assert collector._labelnames in (*of_stages, *of_models)


def test_progress_becomes_metrics_that_parse() -> None:
    progress = StageProgress("pretrain", Nowhere(), run="r1", interval=0.0)
    progress.update(1, 4, "steps", loss=9.0, lr=1e-3, tokens=512, max_logits=[3.0, 8.5], expert_load=[1.5])
    progress.update(2, 4, "steps", loss=8.0, lr=2e-3, tokens=1024, max_logits=[4.0, 7.5], expert_load=[1.25])
    progress.update(2, 4, "steps", grad_norm=0.5, update_rms=0.19, gammas=[1.0, 0.99])
    progress.event("qk_clip", step=2, heads=3, max_logit=101.0)
    progress.event("loss_spike", step=3, reason="up")
    progress.event("spectral_norms", step=3, largest={"q_b_proj": 7.0})
    labels = {"stage": "pretrain", "run": "r1"}
    assert value("k2_stage_progress_ratio", **labels) == 0.5
    assert value("k2_loss", **labels) == 8.0
    assert value("k2_tokens_total", **labels) == 1024
    assert value("k2_attention_logit_max", **labels, layer="1") == 7.5
    assert value("k2_expert_load_imbalance_ratio", **labels, layer="0") == 1.25
    assert value("k2_qk_clip_total", **labels) == 3
    assert value("k2_loss_spikes_total", **labels) == 1
    assert value("k2_spectral_norm_max", **labels, projection="q_b_proj") == 7.0
    assert value("k2_gradient_norm", **labels) == 0.5
    assert value("k2_update_rms", **labels) == 0.19
    assert value("k2_qk_clip_gamma_ratio", **labels, layer="1") == 0.99
    families = {family.name for family in text_string_to_metric_families(generate_latest(REGISTRY).decode())}
    assert {"k2_loss", "k2_tokens", "k2_tokens_per_second", "k2_stage_duration_seconds"} <= families


def test_totals_become_increments_and_a_resumed_total_counts_once() -> None:
    metrics = StageMetrics("rephrase", "r2")
    for done, accepted in ((11, 10), (13, 12), (16, 12)):
        metrics.progress(done, 20, 1.0, None, {"accepted": accepted})
    assert value("k2_rephrase_accepted_total", stage="rephrase", run="r2") == 12
    assert value("k2_rephrase_rejected_total", stage="rephrase", run="r2") == 4
    StageMetrics("synthesize", "r2").progress(7, 7, 1.0, None, {"accepted": 7})
    assert value("k2_trajectories_accepted_total", stage="synthesize", run="r2") == 7


def test_a_served_model_counts_what_it_reads_writes_and_keeps_waiting() -> None:
    metrics = ServeMetrics("m")
    with metrics.question(7) as token:
        assert (value("k2_serve_open_questions", model="m"), value("k2_serve_waiting_questions", model="m")) == (1, 1)
        token()
        assert value("k2_serve_waiting_questions", model="m") == 0
        token()
    with pytest.raises(RuntimeError), metrics.question(3):
        raise RuntimeError
    assert (value("k2_serve_open_questions", model="m"), value("k2_serve_waiting_questions", model="m")) == (0, 0)
    assert value("k2_serve_tokens_total", model="m", kind="read") == 10
    assert value("k2_serve_tokens_total", model="m", kind="written") == 2
    assert value("k2_serve_first_token_seconds_count", model="m") == 1
    assert value("k2_serve_answer_seconds_count", model="m") == 2


def test_steps_name_their_run_in_metrics() -> None:
    """Kubeflow's pods have no K2_RUN: the component says it."""
    progress_for("sft", "first").update(1, 2, "steps")
    assert value("k2_stage_progress_ratio", stage="sft", run="first") == 0.5


def test_cache_hits_count_only_when_cached() -> None:
    for cached in (True, False):
        StageMetrics("sft", "r3").event("stage_finished", {"status": "done", "cached": cached})
    assert value("k2_cache_hits_total", stage="sft", run="r3") == 1


def test_serving_on_loopback_and_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("K2_METRICS_PORT", str(port))
    serve_from_environment()
    StageMetrics("rl", "r4").progress(1, 4, 1.0, None, {"reward": 0.5})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert b'k2_reward{run="r4",stage="rl"} 0.5' in response.read()
    assert not caplog.records
    serve_from_environment()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PORT": "http"}, "K2_METRICS_PORT is 'http'"),
        ({"PORT": "70000"}, "K2_METRICS_PORT is '70000'"),
        ({"PORT": "1", "HOST": "0.0.0.0"}, "K2_METRICS_HOST is 0.0.0.0, .* set K2_METRICS_TOKEN"),
        ({"PORT": "1", "HOST": "::"}, "K2_METRICS_HOST is ::"),
        ({"PORT": "1", "HOST": "somewhere"}, "K2_METRICS_HOST is somewhere"),
        ({"PORT": "1", "TOKEN": ""}, "is empty"),
        ({"PORT": "1", "TOKEN_FILE": "/nonexistent/token"}, "/nonexistent/token cannot be read: No such file"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(f"K2_METRICS_{name}", text)
    with pytest.raises(UserError, match=message) as refused:
        serve_from_environment()
    assert "\n" not in str(refused.value)


def scrape(port: int, *, token: str | None = None, host: str = "127.0.0.1") -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("source", ["TOKEN", "TOKEN_FILE"])
def test_only_who_sends_the_token_sees_metrics(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    for name, text in {
        "PORT": str(port),
        "HOST": "0.0.0.0",
        source: "s3cret" if source == "TOKEN" else str(file),
    }.items():
        monkeypatch.setenv(f"K2_METRICS_{name}", text)
    serve_from_environment()
    StageMetrics("rl", "r5").progress(1, 4, 1.0, None, {"reward": 0.5})
    assert scrape(port, token="s3cret") == 200
    assert [scrape(port, token=wrong) for wrong in (None, "", "s3cre", "s3cret2")] == [401] * 4
    file.write_text("renewed")
    assert scrape(port, token="renewed") == (200 if source == "TOKEN_FILE" else 401)


def test_on_loopback_of_either_family_no_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, address in (("localhost", "127.0.0.1"), ("::1", "[::1]")):
        (port,) = free_ports(1)
        monkeypatch.setenv("K2_METRICS_PORT", str(port))
        monkeypatch.setenv("K2_METRICS_HOST", host)
        serve_from_environment()
        assert scrape(port, host=address) == 200
