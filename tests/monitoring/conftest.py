"""A run whose artifacts are shaped like those of the stages, with curves drawn from formulas."""

import json
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from k2.execution.registry import STAGES
from k2.monitoring.run_record import write_stage_record
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""
STEPS = 300


def _score(value: float, n: int = 500) -> dict[str, Any]:
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-4) / n)
    low, high = max(0.0, value - half), min(1.0, value + half)
    return {"value": value, "low": low, "high": high, "n": n, "better": "higher", "protocol": "p"}


def _accuracy(value: float) -> dict[str, Any]:
    return {"accuracy": value, "low": value - 0.03, "high": value + 0.03, "n": 1000}


def _wave(i: int, k: float = 1.0) -> float:
    return math.sin(i * 12.9898 * k) * 0.5


def _pretrain() -> dict[str, Any]:
    steps = range(1, STEPS + 1)
    logits = [[3 + 40 * (1 - math.exp(-s / 80)) * (1 + 0.3 * n) + 2 * _wave(s, n + 1) for n in range(4)] for s in steps]
    return {
        "curves": {
            "step": list(steps),
            "tokens": [s * 2048 for s in steps],
            "loss": [3.1 + 4 * math.exp(-s / 50) + 0.1 * _wave(s) for s in steps],
            "lr": [2e-3 * min(1, s / 20, (STEPS - s) / 60) for s in steps],
            "max_logits": [[min(v, 100.0) for v in row] for row in logits],
            "grad_norm": [0.4 + 0.1 * _wave(s) for s in steps],
            "update_rms": [0.19 + 0.01 * _wave(s) for s in steps],
            "expert_load": [[1 + 2.5 * math.exp(-s / 60) + 0.2 * abs(_wave(s, n)) for n in (1, 2, 3)] for s in steps],
        },
        "tau": 100.0,
        "head_logits": [[20.0 + 9 * n + 5 * h for h in range(4)] for n in range(4)],
        "clip_counts": [[0, 0, n, 2 * n] for n in range(4)],
        "spectral_norms": [
            {"step": s, "norms": {"q_b_proj": [[s / 100, 1.0]] * 4, "kv_b_proj": [[0.5, s / 200]] * 4}}
            for s in (100, 200, 300)
        ],
        "heldout": [
            {"name": "warm-up", "step": 20, "context": 256, "loss": 5.9123},
            {"name": "stable", "step": 240, "context": 256, "loss": 3.4},
            {"name": "long context", "step": 300, "context": 1024, "loss": 3.21},
        ],
    }


def _rewrite(number: int, *, accepted: bool) -> dict[str, Any]:
    source = (
        "The with statement is used to wrap the execution of a block with methods defined by a context manager. "
        "This allows common try...except...finally usage patterns to be encapsulated for convenient reuse. "
    )
    return {
        "id": f"doc-{number}",
        "style": "learning note" if number % 2 else "encyclopaedic",
        "source": source * (1 + number % 3),
        "rewrite": "A with statement wraps a block in the methods of a context manager, so that patterns built on "
        "try, except and finally can be reused." * (1 + number % 2),
        "reasons": [] if accepted else ["numbers"],
        "similarity": 0.9 + 0.06 * _wave(number) - (0 if accepted else 0.25),
    }


def _trajectory(*, accepted: bool) -> dict[str, Any]:
    call = {"name": "calendar-add", "arguments": '{"title":"dentist","day":"2025-03-04","minutes":30}'}
    messages = [
        {"role": "system", "content": "You keep a family's calendar. Ask before you change anything that exists."},
        {"role": "user", "content": "Please put the dentist on 4 March, half an hour."},
        {
            "role": "assistant",
            "content": "I will add it.",
            "tool_calls": [{"id": "functions.calendar-add:0", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "functions.calendar-add:0", "content": '{"error":"timeout, try again"}'},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "x", "content": '{"id":7,"title":"dentist","day":"2025-03-04"}'},
        {"role": "assistant", "content": f"Done: dentist, 4 March, 30 minutes. {HOSTILE}"},
    ]
    return {
        "id": "train-000004",
        "messages": messages,
        "tools": [{"type": "function", "function": {"name": "calendar-add"}}],
        "scores": {"state": 1.0, "answered": 1.0 if accepted else 0.0},
        "reasons": [] if accepted else ["answered"],
    }


def _samples(models: list[str]) -> dict[str, list[dict[str, Any]]]:
    problem = {"task": "addition_3", "prompt": "123 + 456 ="}
    wrong, right = {"answer": "578", "score": 0.0}, {"answer": "579", "score": 1.0}
    return {name: [problem | (right if name in ("rl", "int4") else wrong)] * 2 for name in models}


def _reports() -> dict[str, dict[str, Any]]:
    rl_steps = range(1, 121)
    sources = {"python-docs": 812, "stdlib": 2411, "sympy": 1203, "scipy": 990}
    models = {
        name: {
            "addition_3/sampled": _score(value),
            "addition_3/greedy": _score(min(1.0, value + 0.06)),
            "tool_call/heldout_servers": _score(value * 0.9, 200),
            "perplexity": {"value": 24.9 - value, "low": 24.1, "high": 25.8, "n": 51200, "better": "lower"},
        }
        for name, value in {"base": 0.004, "sft": 0.31, "rl": 0.58, "int4": 0.56}.items()
    }
    return {
        "corpus": {
            "sources": {n: {"documents": c, "bytes": c * 1700, "version": "1"} for n, c in sources.items()},
            "problems": {"not UTF-8": 2},
            "problem_examples": [],
        },
        "ingest": {
            "documents": 5416,
            "kept": 4310,
            "heldout": 111,
            "dropped": {"exact duplicate": 310, "near duplicate": 402, "too short": 251, HOSTILE[:40]: 32},
            "domains": {"code": 2100, "knowledge": 1120, "math": 1000, "web": 90},
            "classifier_accuracy": 0.947,
        },
        "rephrase": {
            "similarity_histogram": {
                "edges": [i / 20 for i in range(21)],
                "counts": [0] * 12 + [2, 5, 3, 0, 6, 19, 22, 9],
            },
            "accepted_examples": [_rewrite(number, accepted=True) for number in range(8)],
            "rejected_examples": [_rewrite(number, accepted=False) for number in range(8)],
        },
        "tokenize": {"vocab_size": 1024, "train_tokens": 1203412, "heldout_tokens": 40123, "bytes_per_token": 2.9},
        "pretrain": _pretrain(),
        "synthesize": {
            "tools": 214,
            "mcp_tools": 14,
            "domains": 20,
            "tasks": 120,
            "trajectories": 120,
            "accepted": 82,
            "rejected_by_reason": {"answered": 20, "state": 18},
            "judge": {"judge_precision": 0.97, "judge_recall": 0.94, "judged": 120, "flawed": 36},
            "accepted_example": _trajectory(accepted=True),
            "rejected_example": _trajectory(accepted=False),
        },
        "sft": {"curves": {"step": list(range(60)), "loss": [2.9 * math.exp(-s / 20) + 0.4 for s in range(60)]}},
        "rl": {
            "curves": {"step": list(rl_steps), "reward": [0.3 + 0.28 * (1 - math.exp(-s / 40)) for s in rl_steps]},
            "accuracy": [
                {"step": s, "sampled": _accuracy(0.3 + s / 430), "greedy": _accuracy(0.36 + s / 450)}
                for s in range(0, 121, 20)
            ],
            "examples": [{"prompt": "17 + 25 =", "before": "32", "after": "42", "passed": True}] * 3,
        },
        "quantize": {"curves": {"step": [1, 2, 3], "loss": [0.51, 0.47, None]}},
        "evaluate": {"models": models, "order": list(models), "final": "int4", "samples": _samples(list(models))},
        "gate": {"promote": True, "alias": "champion", "reasons": ["pass: addition_3/greedy 0.62 is at least 0.1"]},
    }


METRICS: dict[str, dict[str, Any]] = {
    "rephrase": {"chunks": 61, "accepted": 49, "rejected": 12, "mean_similarity": 0.913, "reasons": {"numbers": 9}},
    "pretrain": {"loss_first": 7.1, "loss_last": 3.1, "heldout_perplexity": 24.8, "clipped_heads": 3, "tokens": 614400},
    "synthesize": {"accepted": 82},
    "sft": {"loss_first": 3.3, "loss_last": 0.53, "accuracy": 0.31},
    "rl": {"accuracy_before": 0.31, "accuracy_after": 0.58, "reward_first": 0.3, "reward_last": 0.58},
    "quantize": {"accuracy_bf16": 0.58, "accuracy_int4": 0.56, "bits_per_weight": 4.5},
    "promote": {"changed": True, "champion": "s3://k2-data/t/export/abc"},
}


def publish(
    store: Store, kind: str, contents: Mapping[str, str], inputs: Mapping[str, Artifact], **statistics: Any
) -> Artifact:
    """An artifact with provenance, as the runner would publish it."""
    key = uuid.uuid4().hex
    with Lease(store, f"work/{key}/lease.json") as lease:
        provenance = {"inputs": {name: artifact.uri for name, artifact in inputs.items()}}
        writer = ArtifactWriter(store, kind, key, WorkArea(store, key, lease), provenance)
        for name, text in contents.items():
            writer.path(name).write_text(text)
        artifact = writer.publish(**statistics)
        writer.discard()
        return artifact


def _contents(stage: str, report: dict[str, Any]) -> dict[str, str]:
    return {"report.json": json.dumps(report)} if report else {"file": stage}


@pytest.fixture
def example_run() -> Callable[..., dict[str, Artifact]]:
    """`example_run(store, run, failing=None)` publishes and records every stage up to the failing one."""
    return make_example_run


def make_example_run(store: Store, run: str, failing: str | None = None) -> dict[str, Artifact]:
    """Publish and record every stage of a run; `failing` ends it with an error."""
    reports, made = _reports(), {}
    for stage, spec in STAGES.items():
        if stage == "report":
            break
        if stage == failing:
            error = {"message": f"{stage}: the disk is full; free some {HOSTILE}", "type": "StageError", "exit_code": 1}
            write_stage_record(store, run, {"stage": stage, "status": "failed", "error": error, "wall_s": 1.5})
            break
        inputs = {name: made[source] for name, source in spec.inputs.items()}
        made[stage] = publish(store, stage, _contents(stage, reports.get(stage, {})), inputs)
        record = {"stage": stage, "status": "done", "wall_s": 0.1, "artifact": made[stage].uri}
        record |= {"cached": stage in ("corpus", "ingest"), "metrics": METRICS.get(stage, {})}
        write_stage_record(store, run, record)
    return made
