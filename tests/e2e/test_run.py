"""The whole DAG as a newcomer runs it, and everything that can go wrong on the way."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from k2.execution.registry import STAGES
from tests.e2e.conftest import Finished, Site

pytestmark = [pytest.mark.e2e]
Nano = tuple[Site, Finished]
MANDATORY = {
    "pretrain": {"loss_first", "loss_last", "tokens", "max_attention_logit", "clipped_heads"},
    "rephrase": {"chunks", "accepted", "rejected", "mean_similarity"},
    "synthesize": {"tools", "tasks", "trajectories", "accepted"},
    "sft": {"loss_first", "loss_last", "accuracy"},
    "rl": {"reward_first", "reward_last", "accuracy_before", "accuracy_after"},
    "quantize": {"accuracy_bf16", "accuracy_int4", "bits_per_weight"},
    "evaluate": {"scores"},
}


def test_every_stage_is_done(nano: Nano) -> None:
    _, run = nano
    assert run.code == 0, run.err
    summary = run.json
    assert summary["status"] == "done"
    assert list(summary["stages"]) == list(STAGES)
    assert {stage["status"] for stage in summary["stages"].values()} == {"done"}


@pytest.mark.parametrize("stage", MANDATORY)
def test_the_metrics_that_stay(nano: Nano, stage: str) -> None:
    assert set(nano[1].json["stages"][stage]["metrics"]) >= MANDATORY[stage]


def test_the_run_folder(nano: Nano) -> None:
    site, run = nano
    folder = site.folder / "runs" / run.json["run"]
    assert json.loads((folder / "summary.json").read_text()) == run.json
    page = (folder / "report.html").read_text()
    assert len(page) <= 1_000_000
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "").replace("http://127.0.0.1", "")
    kinds = {json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()}
    assert {"run_started", "stage_started", "stage_finished"} <= kinds


def test_a_second_run_does_nothing_twice_and_leaves_no_temporary_file(nano: Nano, temporary: Path) -> None:
    site, _ = nano
    again = site.k2("run", "--preset", "nano", "--json", TMPDIR=str(temporary))
    assert again.code == 0, again.err
    assert not list(temporary.iterdir())
    assert {name for name, stage in again.json["stages"].items() if not stage["cached"]} == set()


def test_a_changed_field_runs_only_what_depends_on_it(nano: Nano) -> None:
    site, _ = nano
    changed = site.k2("run", "--preset", "nano", "--set", "evaluate.seed=4321", "--json")
    assert changed.code == 0, changed.err
    ran = {name for name, stage in changed.json["stages"].items() if not stage["cached"]}
    assert "evaluate" in ran
    assert ran <= {"evaluate", "gate", "promote", "report"}


def test_the_champion_leads_back_to_the_documents(nano: Nano) -> None:
    site, _ = nano
    text = site.k2("lineage", "champion").out
    for stage in ("export", "quantize", "rl", "sft", "pretrain", "tokenize", "rephrase", "ingest", "corpus"):
        assert f"/{stage}/" in text


def test_no_secret_is_written_anywhere(nano: Nano) -> None:
    site, _ = nano
    keys = json.loads((site.folder / ".k2/server/s3.json").read_text())["identities"][0]["credentials"][0]
    for path in (site.folder / "runs").rglob("*"):
        if path.is_file():
            assert keys["secretKey"].encode() not in path.read_bytes(), path


def test_a_stage_alone_finds_its_inputs(nano: Nano) -> None:
    site, run = nano
    alone = site.k2("tokenize", "--preset", "nano", "--json")
    assert alone.code == 0, alone.err
    assert alone.json["cached"]
    assert alone.json["artifact"] == run.json["stages"]["tokenize"]["artifact"]


README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^\$ k2 (.+)$", README, re.MULTILINE))
def test_the_readme_s_commands_work(nano: Nano, command: str) -> None:
    site, _ = nano
    shipped = Path("pipelines") / "deployments"
    shutil.copytree(Path(__file__).parents[2] / shipped, site.folder / shipped, dirs_exist_ok=True)
    run = site.k2(*shlex.split(command))
    assert run.code == 0, run.err


def test_chat_answers_with_the_champion(nano: Nano) -> None:
    site, _ = nano
    process = site.start("chat", "--max-tokens", "4", "--temperature", "0")
    assert process.stdin is None
    process.communicate()
    assert process.returncode == 0


def test_fetch_copies_an_artifact(nano: Nano, tmp_path: Path) -> None:
    site, run = nano
    uri = run.json["stages"]["export"]["artifact"]
    assert site.k2("fetch", uri, str(tmp_path / "model")).code == 0
    assert (tmp_path / "model" / "int4" / "config.json").exists()
    assert site.k2("fetch", uri, str(tmp_path / "model")).code == 2


def wait_for(site: Site, what: str, seconds: float = 300.0) -> Path:
    """The event file of the only run, as soon as it says `what`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for events in (site.folder / "runs").glob("*/events.jsonl"):
            if what in events.read_text():
                return events
        time.sleep(0.05)
    raise TimeoutError(f"no {what} in {seconds} s")


@pytest.mark.timeout(1800)
def test_kill_9_in_every_stage_in_turn_gives_the_same_bytes(nano: Nano, site: Site, temporary: Path) -> None:
    """The run is killed in each stage at a random moment; its steps die with it, and the next run continues."""
    whole, first = nano
    for stage in STAGES:
        process = site.start("run", "--preset", "nano", TMPDIR=str(temporary))
        events = wait_for(site, f'"kind":"stage_started","stage":"{stage}"')
        time.sleep(random.uniform(0, first.json["stages"][stage]["wall_s"]))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.5)
        size = events.stat().st_size
        time.sleep(0.5)
        assert events.stat().st_size == size, f"{stage} outlived the run"
        shutil.rmtree(site.folder / "runs")
    again = site.k2("run", "--preset", "nano", "--json", TMPDIR=str(temporary))
    assert again.code == 0, again.err
    assert not list(temporary.iterdir())
    ours, theirs = again.json["stages"], first.json["stages"]
    for name in STAGES:
        if not STAGES[name].always:
            assert ours[name]["artifact"] == theirs[name]["artifact"], name
            assert site.digest(ours[name]["artifact"]) == whole.digest(theirs[name]["artifact"]), name


def test_ctrl_c_leaves_a_report_and_code_130(site: Site, temporary: Path) -> None:
    process = site.start("run", "--preset", "nano", TMPDIR=str(temporary))
    events = wait_for(site, "stage_started")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert not list(temporary.iterdir())
    summary = json.loads((events.parent / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert (events.parent / "report.html").exists()


def test_a_corrupt_artifact_is_made_anew(nano: Nano) -> None:
    site, run = nano
    from k2.store.artifacts import open_uri
    from k2.store.client import Store
    from k2.store.embedded import embedded_server

    uri = run.json["stages"]["tokenize"]["artifact"]
    with pytest.MonkeyPatch.context() as patch, embedded_server(site.folder / ".k2") as server:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.delenv("K2_S3_PREFIX", raising=False)
        store = Store.from_environment()
        artifact = open_uri(store, uri)
        store.put(f"{artifact.kind}/{artifact.key}/{artifact.manifest.attempt}/train/index.json", b"rot")
    again = site.k2("run", "--preset", "nano", "--json")
    assert again.code == 0, again.err
    ran = {name for name, stage in again.json["stages"].items() if not stage["cached"]}
    assert ran == {"tokenize", "report"}


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--set", "pretrain.sede=1"], {}, "pretrain.sede: no such field; the fields are"),
        (["--preset", "huge"], {}, "preset: 'huge' is unknown; choose one of"),
        (["--corpus", "absent/"], {}, "absent' does not exist or is empty"),
        (["--config", "absent.yaml"], {}, "absent.yaml"),
        ([], {"K2_S3_ENDPOINT": "http://127.0.0.1:9", "K2_S3_RETRIES": "0"}, "127.0.0.1:9, bucket 'k2-data'"),
        ([], {"K2_S3_ENDPOINT": "not a url"}, "K2_S3_ENDPOINT must look like"),
    ],
)
def test_wrong_use_is_one_clear_line_and_code_2(
    site: Site, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    credentials = {"K2_S3_ACCESS_KEY": "a", "K2_S3_SECRET_KEY": "hidden-value"} if variables else {}
    run = site.k2("run", "--preset", "nano", *arguments, **variables, **credentials)
    assert run.code == 2, run.err
    assert message in run.err
    assert "Traceback" not in run.err
    assert "hidden-value" not in run.err + run.out


def test_a_corpus_without_text_is_named(site: Site) -> None:
    (site.folder / "empty").mkdir()
    (site.folder / "empty" / "blank.txt").write_text("  \n")
    run = site.k2("run", "--preset", "nano", "--corpus", "empty")
    assert run.code == 2
    assert "holds no text" in run.err
    assert "Traceback" not in run.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_is_one_clear_line(site: Site) -> None:
    scratch = site.folder / "scratch"
    scratch.mkdir()
    os.system(f"mount -t tmpfs -o size=64k none {scratch}")
    try:
        run = site.k2("run", "--preset", "nano", K2_SCRATCH=str(scratch))
    finally:
        os.system(f"umount {scratch}")
    assert run.code == 1
    assert "no space left" in run.err
    assert "Traceback" not in run.err
    assert site.k2("corpus", "--preset", "nano").code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_disk_that_fills_up_under_the_store_is_one_clear_line(site: Site) -> None:
    home = site.folder / ".k2"
    home.mkdir()
    os.system(f"mount -t tmpfs -o size=600m none {home}")
    try:
        process = site.start("run", "--preset", "nano")
        wait_for(site, '"kind":"stage_started","stage":"ingest"')
        with (home / "fill").open("wb", buffering=0) as fill:
            while process.poll() is None:  # what a failing step frees is taken again: the disk stays full
                with suppress(OSError):
                    fill.write(bytes(2**16))
                    continue
                time.sleep(0.02)
        _, err = process.communicate()
    finally:
        os.system(f"umount -l {home}")
    assert process.returncode == 1, err
    assert "no space left on disk for" in err, err
    assert "Traceback" not in err
