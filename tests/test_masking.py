"""Secrets of the environment reach no log, event, record or error, whichever way they were on."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2.masking import MASK, masked
from k2.monitoring.events import event_line
from k2.monitoring.run_record import read_run, write_stage_record
from k2.store.client import Store

SECRETS = {
    "K2_S3_SECRET_KEY": 's3cr"et/+value',
    "K2_S3_ACCESS_KEY": "access-0123",
    "K2_LLM_API_KEY": "llm-key-456",
    "AWS_SESSION_TOKEN": "session-789",
    "AWS_ACCESS_KEY_ID": "AKID-0123456",
    "K2_METRICS_TOKEN": "metrics-abc",
    "SOME_PASSWORD": "llm-key-456-longer",
}


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-or-true")
    monkeypatch.setenv("OTHER_TOKEN", "short")


def clean(text: str) -> bool:
    values = [*SECRETS.values(), *(json.dumps(value)[1:-1] for value in SECRETS.values())]
    return MASK in text and not any(value in text for value in values) and "-longer" not in text


def test_values_of_credential_variables_are_masked_and_nothing_else() -> None:
    assert clean(masked("; ".join([*SECRETS.values(), json.dumps(SECRETS)])))
    innocent = "short false-or-true https://host:1/a@b s3://bucket/x 10.0.0.1"
    assert masked(innocent) == innocent
    assert masked("http://me:pw@proxy:8080/x") == f"http://{MASK}@proxy:8080/x"


def test_events_and_records_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    line = event_line("sft", "failed", {"error": f"denied: {SECRETS['K2_S3_SECRET_KEY']}", "nested": [SECRETS]})
    assert clean(line)
    assert json.loads(line)["stage"] == "sft"


def test_a_run_s_record_is_masked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_LLM_API_KEY", SECRETS["K2_LLM_API_KEY"])
    error = {"message": f"the endpoint refused {SECRETS['K2_LLM_API_KEY']}", "exit_code": 1}
    write_stage_record(store, "r", {"stage": "sft", "status": "failed", "error": error})
    (record,) = read_run(store, "r")
    assert record["error"]["message"] == f"the endpoint refused {MASK}"


PROGRAM = """
import logging, os, sys
from k2.masking import install
install(); install()
secret = os.environ["K2_S3_SECRET_KEY"]
logging.getLogger("urllib3.connectionpool").warning("Retrying %s after %r", {"authorization": secret}, secret)
try:
    raise ValueError(secret)
except ValueError:
    logging.getLogger("x").exception("failed")
if sys.argv[1] == "crash":
    raise RuntimeError(f"http://u:{secret}@proxy")
from k2.execution.component import describe, leave
leave(KeyError(secret) if sys.argv[1] == "defect" else __import__("k2.errors").errors.StageError(secret))
"""


@pytest.mark.parametrize("way", ["crash", "defect", "stage"])
def test_nothing_that_a_process_writes_has_them(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert clean(done.stdout + done.stderr), done.stderr
    assert done.stderr.count("Retrying") == 1
    assert ("Traceback" in done.stderr.rpartition("failed")[2]) or way == "stage"


def test_the_command_line_masks_its_errors(tmp_path: Path) -> None:
    """An endpoint with a password in it is refused, without the password in the refusal."""
    command = [sys.executable, "-m", "k2.cli", "fetch", f"s3://{SECRETS['K2_LLM_API_KEY']}/x", str(tmp_path / "out")]
    environment = os.environ | {"K2_S3_ENDPOINT": "http://127.0.0.1:9", "K2_S3_RETRIES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (1, 2)
    assert not any(value in done.stderr for value in SECRETS.values())


def test_logging_still_formats(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("k2").warning("%d of %s", 3, "four")
    assert caplog.messages == ["3 of four"]
