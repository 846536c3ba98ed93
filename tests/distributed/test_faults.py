"""What happens to several ranks when one of them hangs, freezes, slows down or computes nonsense."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k2.distributed.slow import STEPS, SlowRanks
from k2.distributed.watchdog import verdict
from tests.distributed import faults
from tests.distributed.selection import LATER

ROOT = Path(__file__).parents[2]


def trained(fault: str, folder: Path) -> tuple[int, str, dict[str, Any]]:
    """Exit code, error output, and what rank 0 reported."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(ROOT / "tests/distributed/faults.py"), fault, str(folder)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    report = folder / "0.json"
    return run.returncode, run.stderr, json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.parametrize(
    ("fault", "reason"), [("hang", "in no collective"), pytest.param("freeze", "no sign of life", marks=LATER)]
)
def test_the_rank_that_hangs_is_named_with_its_step_and_the_run_ends(fault: str, reason: str, tmp_path: Path) -> None:
    code, said, report = trained(fault, tmp_path)
    assert code != 0
    assert f"hung: rank 1 ({reason})" in said
    assert re.search(rf"rank 0: step {faults.WHEN - 1}, waits in 'sums', number \d+ of float64\[5\], int64\[", said)
    assert re.search(r"rank \d, in .*; its last collectives:\n  step \d, number \d+: ", said)
    recorded = re.findall(r"rank (\d), torch's flight recorder: (.*)", said)
    assert recorded  # torchrun ends the other as soon as one has said it
    for rank, found in recorded:
        expected = (
            r"gloo:all_reduce of \[\[5\]\], number \d+ of group 0 default_pg" if rank == "0" else "nothing under way"
        )
        assert re.match(expected, found), found
    assert not report


def test_a_slow_rank_is_named_and_a_gradient_that_is_no_number_on_one_skips_the_step_on_all(tmp_path: Path) -> None:
    code, said, report = trained("slow,nan", tmp_path)
    assert code == 0, said
    events = [event for event in report["events"] if event["kind"] == "slow_rank"]
    assert [event["step"] for event in events] == [STEPS]
    assert events[0]["ranks"].startswith("rank 1: 0.1")
    skipped = [event for event in report["events"] if event["kind"] == "skipped_update"]
    assert [event["step"] for event in skipped] == [faults.WHEN]
    assert skipped[0]["reason"].endswith("gradient norm nan, from rank 1")
    losses = [update["loss"] for update in report["updates"]]
    assert len(losses) == faults.STEPS
    assert losses[-1] < losses[0]


def state(beat: int, step: int, name: str | None, number: int = 30) -> tuple[int, dict[str, Any]]:
    place = {"step": step, "number": number, "in": name, "tensors": " of int64[2]"}
    return beat, {**place, "after": "maxima", "idle_s": 9.0}


def test_who_keeps_the_others_waiting() -> None:
    waiting, working, dead = state(5, 7, "sums"), state(5, 7, None), state(1, 7, "sums")
    before = {0: state(1, 7, "sums"), 1: dead, 2: state(1, 7, None)}
    assert verdict(before, {0: waiting, 1: dead, 2: working}, 3)[0] == "hung: rank 1 (no sign of life)"
    assert verdict(before, {0: waiting, 2: working}, 3)[0] == "hung: rank 1 (no sign of life)"
    assert verdict(before, {0: waiting, 1: waiting, 2: working}, 3)[0] == "hung: rank 2 (in no collective)"
    late = state(5, 6, "maxima")
    assert verdict(before, {0: waiting, 1: late, 2: waiting}, 3)[0] == "hung: rank 1 (an earlier step)"
    other = state(5, 7, "maxima", 29)
    assert verdict(before, {0: waiting, 1: other, 2: waiting}, 3)[0] == "hung: rank 1 (an earlier collective)"
    assert verdict(before, {0: waiting, 1: waiting, 2: waiting}, 3)[0] == "hung: all ranks wait (nobody stands out)"
    assert verdict(before, {0: waiting, 1: late}, 3)[1:] == [
        "  rank 0: step 7, waits in 'sums', number 30 of int64[2], for 9.0 s",
        "  rank 1: step 6, waits in 'maxima', number 30 of int64[2], for 9.0 s",
        "  rank 2: never gave a sign",
    ]


def test_a_rank_is_slow_when_its_peers_are_not() -> None:
    ranks = SlowRanks(2)
    # The second pipeline stage has more to do: no reason to accuse it.
    for _ in range(STEPS - 1):
        assert ranks.update([1.0, 1.0, 3.0, 3.0]) is None
    assert ranks.update([9.0, 1.0, 3.0, 3.0]) is None
    found = [ranks.update([1.0, 1.0, 3.0, 10.0]) for _ in range(STEPS)]
    assert found[:-1] == [None] * (STEPS - 1)
    assert found[-1] == "rank 3: 10.000 s, its peers 3.000 s"
