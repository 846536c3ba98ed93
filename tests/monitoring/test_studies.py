"""A run of a study on the terminal and in its report, and the charts that only studies draw."""

import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from k2.monitoring.figures import Series, line_chart
from k2.monitoring.report import MAX_BYTES, Run, render_report
from k2.monitoring.run_record import read_run, write_stage_record
from k2.monitoring.terminal import Board, render
from k2.store.artifacts import Artifact
from k2.store.client import Store

STUDIES = Path(__file__).parents[2] / "docs" / "ablations"


def event(stage: str, kind: str, **values: object) -> dict[str, object]:
    return {"time": "2026-01-01T00:00:00+00:00", "stage": stage, "kind": kind, **values}


def test_the_trainings_of_a_study_have_rows_from_its_plan_on() -> None:
    board = Board([])
    board.take(event("run", "planned", stages=["tokenize", "tau-100.1", "muonclip.0.005.101"]))
    board.take(event("tau-100.1", "stage_started"))
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(render(board, 1.0, 120, 1.8e9))
    text = capture.get()
    assert "▸  tau-100.1" in text
    assert "muonclip.0.005.101" in text
    assert "0 of 3 stages" in text


def test_a_study_that_failed_names_the_arm(store: Store, make_artifact: Callable[..., Artifact]) -> None:
    write_stage_record(store, "r", {"stage": "tokenize", "status": "done"})
    write_stage_record(store, "r", {"stage": "tau-1.2", "status": "failed", "error": {"message": "loss nan"}})
    page = render_report(store, Run("r", "tiny", "failed", 1.0), read_run(store, "r"))
    assert "tau-1.2 failed" in page
    assert "Train one arm of the study" in page
    assert "compare did not run" in page
    assert "Reinforcement learning" not in page


def test_powers_of_ten_are_equally_far_apart() -> None:
    chart = line_chart("logits", [1, 2, 3], [Series("a", [1.0, 10.0, 100.0])], x_label="x", y_label="y", log=True)
    path = re.search(r'class="curve s0" d="M\S+ (\S+)L\S+ (\S+)L\S+ (\S+)"', chart)
    assert path is not None
    first, second, third = map(float, path.groups())
    assert first - second == second - third > 0
    assert all(f">{mark}</text>" in chart for mark in (1, 10, 100))


def test_a_band_reaches_from_low_to_high() -> None:
    series = Series("a", [1.0, 2.0], low=[0.0, 1.0], high=[2.0, 4.0])
    chart = line_chart("loss", [1, 2], [series], x_label="x", y_label="y")
    found = re.search(r'class="band s0" points="([^"]+)"', chart)
    assert found is not None
    points = [tuple(map(float, point.split(","))) for point in found[1].split()]
    assert [x for x, _ in points] == [points[0][0], points[1][0], points[1][0], points[0][0]]
    assert points[0][1] < points[3][1], "the upper edge comes first, and y grows downwards"


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.json")), ids=lambda file: file.stem)
def test_the_page_of_a_whole_study_is_self_contained_and_small(
    file: Path, store: Store, make_artifact: Callable[..., Artifact]
) -> None:
    made = make_artifact("compare", {"report.json": file})
    write_stage_record(store, "r", {"stage": "tokenize", "status": "done"})
    write_stage_record(store, "r", {"stage": "compare", "status": "done", "artifact": made.uri})
    page = render_report(store, Run("r", "tiny", "done", 1.0), read_run(store, "r"))
    assert json.loads(file.read_text())["title"] in html.unescape(page)
    assert len(page.encode()) <= MAX_BYTES
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import| src=|<link", page)
