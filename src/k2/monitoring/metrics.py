"""Every Prometheus metric of K2, in one registry of its own.

Names start with `k2_` and end in a base unit; labels are `stage`, `run`, and `layer` where there is one value a layer.
Those of `k2 serve` start with `k2_serve_` and have the label `model`.
"""

import hmac
import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from k2.errors import UserError

log = logging.getLogger(__name__)

REGISTRY = CollectorRegistry()

_LABELS = ("stage", "run")
_LAYER = (*_LABELS, "layer")
_MODEL = ("model",)
_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0)


def _gauge(name: str, help_: str, labels: tuple[str, ...] = _LABELS) -> Gauge:
    return Gauge(f"k2_{name}", help_, labels, registry=REGISTRY)


def _counter(name: str, help_: str, labels: tuple[str, ...] = _LABELS) -> Counter:
    return Counter(f"k2_{name}", help_, labels, registry=REGISTRY)


def _seconds(name: str, help_: str) -> Histogram:
    return Histogram(f"k2_{name}_seconds", help_, _MODEL, buckets=_BUCKETS_S, registry=REGISTRY)


STAGE_DURATION = _gauge("stage_duration_seconds", "Wall time the stage has taken so far, or took.")
PROGRESS = _gauge("stage_progress_ratio", "Share of the stage's current phase that is finished, 0 to 1.")
LOSS = _gauge("loss", "Training loss of the last step, in nats per token.")
LEARNING_RATE = _gauge("learning_rate", "Learning rate of the last step.")
TOKENS_PER_SECOND = _gauge("tokens_per_second", "Tokens trained on per second, over the last half minute.")
ATTENTION_LOGIT = _gauge("attention_logit_max", "Largest logit that reached a softmax in the last step.", _LAYER)
ATTENTION_LOGIT_ALLOWED = _gauge("attention_logit_allowed_max", "QK-Clip's tau: heads with larger logits are rescaled.")
QK_CLIP_GAMMA = _gauge("qk_clip_gamma_ratio", "Smallest factor of QK-Clip in the last step; 1 clips nothing.", _LAYER)
GRADIENT_NORM = _gauge("gradient_norm", "Global 2-norm of the last step's gradient, before clipping.")
UPDATE_RMS = _gauge("update_rms", "Root mean square of Muon's last update, before the learning rate.")
SPECTRAL_NORM = _gauge(
    "spectral_norm_max", "Largest of the heads' spectral norms, as last measured.", (*_LABELS, "projection")
)
EXPERT_FLOOR = _gauge("expert_load_floor_ratio", "Idlest expert's load over the mean; 0 is a dead expert.", _LAYER)
EXPERT_IMBALANCE = _gauge("expert_load_imbalance_ratio", "Busiest expert's load over the mean; 1 is balance.", _LAYER)
REWARD = _gauge("reward", "Mean reward of the last RL step.")
ACCURACY = _gauge("accuracy_ratio", "Share of verifiable answers that are right, as last measured, 0 to 1.")
CRITIC_AGREEMENT = _gauge("critic_agreement_ratio", "Share of verifiable pairs that the critic orders as they are.")
MFU = _gauge("mfu_ratio", "Model FLOP/s of the last steps over K2_PEAK_FLOPS, 0 to 1; pretrain only.")
PROGRESS_TIME = _gauge("progress_timestamp_seconds", "Unix time of the stage's last progress.")
CHECKPOINT_TIME = _gauge("checkpoint_timestamp_seconds", "Unix time of the last published checkpoint.")
TOKENS = _counter("tokens", "Tokens trained on.")
QK_CLIP = _counter("qk_clip", "Times a head was rescaled by QK-Clip.")
SKIPPED_UPDATES = _counter("skipped_updates", "Optimizer steps left out: gradient not finite, or a loss spike.")
LOSS_SPIKES = _counter("loss_spikes", "Steps whose loss was far above its running mean.")
REPHRASE_ACCEPTED = _counter("rephrase_accepted", "Rewritten chunks that passed the fidelity checks.")
REPHRASE_REJECTED = _counter("rephrase_rejected", "Rewritten chunks that failed a fidelity check.")
TRAJECTORIES_ACCEPTED = _counter("trajectories_accepted", "Trajectories the judge accepted.")
TRAJECTORIES_REJECTED = _counter("trajectories_rejected", "Trajectories the judge rejected.")
CACHE_HITS = _counter("cache_hits", "Stages whose artifact existed already.")

SERVE_REQUESTS = _counter("serve_requests", "HTTP requests answered, by status.", (*_MODEL, "status"))
SERVE_TOKENS = _counter("serve_tokens", "Tokens read from prompts, and written in answers.", (*_MODEL, "kind"))
SERVE_OPEN = _gauge("serve_open_questions", "Questions asked whose answers are not complete.", _MODEL)
SERVE_WAITING = _gauge("serve_waiting_questions", "Of those, questions that no token has come for.", _MODEL)
SERVE_FIRST_TOKEN = _seconds("serve_first_token", "From the question to the first token of its answers.")
SERVE_ANSWER = _seconds("serve_answer", "From the question to the end of its answers.")

_VALUE_GAUGES = {
    "loss": LOSS,
    "lr": LEARNING_RATE,
    "grad_norm": GRADIENT_NORM,
    "update_rms": UPDATE_RMS,
    "reward": REWARD,
    "accuracy": ACCURACY,
    "critic_agreement": CRITIC_AGREEMENT,
    "tau": ATTENTION_LOGIT_ALLOWED,
}
_VALUE_LAYERS = {
    "max_logit": ATTENTION_LOGIT,
    "max_logits": ATTENTION_LOGIT,
    "gammas": QK_CLIP_GAMMA,
    "expert_load": EXPERT_IMBALANCE,
    "expert_floor": EXPERT_FLOOR,
}
_VALUE_COUNTERS = {
    ("rephrase", "accepted"): REPHRASE_ACCEPTED,
    ("rephrase", "rejected"): REPHRASE_REJECTED,
    ("synthesize", "accepted"): TRAJECTORIES_ACCEPTED,
    ("synthesize", "rejected"): TRAJECTORIES_REJECTED,
    ("pretrain", "tokens"): TOKENS,
    ("sft", "tokens"): TOKENS,
    ("rl", "tokens"): TOKENS,
    ("quantize", "tokens"): TOKENS,
}


class StageMetrics:
    """Turns what one stage reports into metrics. Values named as in the tables above count; others do not."""

    def __init__(self, stage: str, run: str) -> None:
        self._stage, self._run = stage, run
        self._totals: dict[str, float] = {}
        self._flops_per_token, self._peak = 0.0, float(os.environ.get("K2_PEAK_FLOPS", "0"))

    def progress(
        self, done: float, total: float, elapsed: float, token_rate: float | None, values: Mapping[str, Any]
    ) -> None:
        """Take in one progress update; `tokens` and `accepted` are totals so far, what is not accepted is rejected."""
        PROGRESS.labels(self._stage, self._run).set(done / total if total else 1.0)
        PROGRESS_TIME.labels(self._stage, self._run).set_to_current_time()
        STAGE_DURATION.labels(self._stage, self._run).set(elapsed)
        if token_rate is not None:
            TOKENS_PER_SECOND.labels(self._stage, self._run).set(token_rate)
            if self._peak and self._flops_per_token:
                MFU.labels(self._stage, self._run).set(token_rate * self._flops_per_token / self._peak)
        rejected = {"rejected": done - values["accepted"]} if "accepted" in values else {}
        for name, value in (rejected | dict(values)).items():
            self._value(name, value)

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Take in one event: a phase's work, clipped heads, a spike, a skipped update, a checkpoint, a cached stage."""
        if kind == "phase":
            self._flops_per_token = values["flops_per_token"]
        elif kind == "qk_clip":
            QK_CLIP.labels(self._stage, self._run).inc(values["heads"])
        elif kind == "skipped_update":
            SKIPPED_UPDATES.labels(self._stage, self._run).inc()
        elif kind == "loss_spike":
            LOSS_SPIKES.labels(self._stage, self._run).inc()
        elif kind == "spectral_norms":
            for projection, norm in values["largest"].items():
                SPECTRAL_NORM.labels(self._stage, self._run, projection).set(norm)
        elif kind == "checkpoint":
            CHECKPOINT_TIME.labels(self._stage, self._run).set_to_current_time()
        elif kind == "stage_finished" and values.get("cached"):
            CACHE_HITS.labels(self._stage, self._run).inc()

    def _value(self, name: str, value: Any) -> None:
        if name in _VALUE_GAUGES:
            _VALUE_GAUGES[name].labels(self._stage, self._run).set(value)
        elif name in _VALUE_LAYERS:
            self._layers(_VALUE_LAYERS[name], value)
        elif counter := _VALUE_COUNTERS.get((self._stage, name)):
            counter.labels(self._stage, self._run).inc(max(0.0, value - self._totals.get(name, 0.0)))
            self._totals[name] = value

    def _layers(self, gauge: Gauge, value: Any) -> None:
        """One number a layer, or one number that is the maximum over all layers."""
        rows = enumerate(value) if isinstance(value, (list, tuple)) else (("all", value),)
        for layer, number in rows:
            gauge.labels(self._stage, self._run, str(layer)).set(number)


class ServeMetrics:
    """What one served model does."""

    def __init__(self, model: str) -> None:
        self._model = model

    def request(self, status: int) -> None:
        """An HTTP request was answered."""
        SERVE_REQUESTS.labels(self._model, str(status)).inc()

    @contextmanager
    def question(self, prompt_tokens: int) -> Iterator[Callable[[], None]]:
        """From a question to the end of its answers, or to when nobody listens; yields what each token calls."""
        started, made = time.monotonic(), 0
        written = SERVE_TOKENS.labels(self._model, "written")
        SERVE_TOKENS.labels(self._model, "read").inc(prompt_tokens)
        SERVE_OPEN.labels(self._model).inc()
        SERVE_WAITING.labels(self._model).inc()

        def token() -> None:
            nonlocal made
            made += 1
            written.inc()
            if made == 1:
                SERVE_WAITING.labels(self._model).dec()
                SERVE_FIRST_TOKEN.labels(self._model).observe(time.monotonic() - started)

        try:
            yield token
        finally:
            SERVE_OPEN.labels(self._model).dec()
            SERVE_WAITING.labels(self._model).dec(made == 0)
            SERVE_ANSWER.labels(self._model).observe(time.monotonic() - started)


Token = Callable[[], str]
"""Reads the token that a scraper must send; called for each request, as the kubelet replaces mounted Secrets."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers scrapers at the same time, and never keeps the process from ending."""

    daemon_threads = True


class _SixServer(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    """Writes no line per request: standard error is for the stage."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


def serve_metrics(port: int, host: str = "127.0.0.1", token: Token | None = None) -> None:
    """Serve the registry over HTTP from a thread, to those who send `token` as a bearer token.

    A port that is taken is logged, and the work goes on.
    """
    kind = _SixServer if ":" in host else _Server
    try:
        server = make_server(host, port, _application(token), kind, _Quiet)
    except OSError as error:
        log.warning("metrics are not served on %s:%d: %s", host, port, error.strerror)
        return
    threading.Thread(target=server.serve_forever, daemon=True, name="metrics").start()


def _application(token: Token | None) -> Callable[..., Iterable[bytes]]:
    """The registry's exposition; with a token, only for requests that have it."""
    exposition: Any = make_wsgi_app(REGISTRY)

    def answer(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        sent = str(environ.get("HTTP_AUTHORIZATION", "")).encode()
        if token is not None and not hmac.compare_digest(sent, f"Bearer {token()}".encode()):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
            return []
        served: Iterable[bytes] = exposition(environ, start_response)
        return served

    return answer


def serve_from_environment() -> None:
    """Serve on `K2_METRICS_PORT` when it is set; `K2_METRICS_HOST` is loopback unless it says otherwise.

    The token is in `K2_METRICS_TOKEN`, or in the file that `K2_METRICS_TOKEN_FILE` names.

    Raises:
        UserError: the port is not a number, the token is empty, or others could read metrics without one.
    """
    port, host = os.environ.get("K2_METRICS_PORT"), os.environ.get("K2_METRICS_HOST", "127.0.0.1")
    if not port:
        return
    if not (port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"K2_METRICS_PORT is {port!r}; it must be a port number")
    token = _token()
    if token is None and not _is_loopback(host):
        raise UserError(
            f"K2_METRICS_HOST is {host}, which others reach: set K2_METRICS_TOKEN or K2_METRICS_TOKEN_FILE from a"
            " Secret, or leave the host at 127.0.0.1"
        )
    serve_metrics(int(port), host, token)


def _token() -> Token | None:
    value, file = os.environ.get("K2_METRICS_TOKEN"), os.environ.get("K2_METRICS_TOKEN_FILE")
    if value is None and not file:
        return None

    def token() -> str:
        return value if value is not None else Path(str(file)).read_text(encoding="ascii").strip()

    try:
        if token():
            return token
    except OSError as error:
        raise UserError(f"K2_METRICS_TOKEN_FILE: {file} cannot be read: {error.strerror}") from None
    raise UserError("K2_METRICS_TOKEN, or the file K2_METRICS_TOKEN_FILE, is empty: put a token into the Secret")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
