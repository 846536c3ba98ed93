"""`k2 bench`: every topic is there and speaks the same way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TOPICS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "k2.cli", "bench", *arguments], capture_output=True, text=True)


def test_topics_are_listed() -> None:
    assert bench().stdout.split() == TOPICS


def test_rows_are_for_programs_and_for_people() -> None:
    rows = [json.loads(line) for line in bench("quant", "--rounds", "2", "--json").stdout.splitlines()]
    assert len(rows) == 2
    assert {"claim", "peer", "ratio", "low", "high", "target", "better"} <= set(rows[0])
    assert rows[0]["low"] <= rows[0]["ratio"] <= rows[0]["high"]
    lines = bench("quant", "--rounds", "1").stdout.splitlines()
    assert lines[0] == rows[0]["claim"]
    assert "against compressed-tensors  target >= 3, " in lines[1]


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_takes_the_common_options(topic: str) -> None:
    text = (FOLDER / f"{topic}.py").read_text()
    assert "run(__doc__, " in text.rstrip().splitlines()[-1] or topic == "gpu"


def test_an_unknown_topic_is_refused() -> None:
    done = bench("speed")
    assert done.returncode == 2
    assert "bench 'speed': no such topic; there are " in done.stderr
