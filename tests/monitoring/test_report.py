"""The HTML report: complete for a whole run, honest for a broken one, safe for any text."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from k2.monitoring.report import MAX_BYTES, Run, collect, render_report, timeline
from k2.monitoring.run_record import read_run, write_stage_record
from k2.store.artifacts import Artifact
from k2.store.client import Store

Example = Callable[..., dict[str, Artifact]]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks nesting and keeps tags with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def render(store: Store, run: str, status: str, examples: int = 3) -> str:
    return render_report(store, Run(run, "tiny", status, 12.0), read_run(store, run), examples)


def test_a_whole_run_shows_everything(store: Store, example_run: Example) -> None:
    made = example_run(store, "r1")
    html = render(store, "r1", "done")
    page = Page(html)
    assert "not recorded" not in page.text
    assert "did not run" not in page.text
    for expected in (
        "Of 5,416 documents 4,310 are trained on and 111 are held out.",
        "Of 61 chunks 49 rewrites were accepted and 12 rejected.",
        "τ = 100",
        "calendar-add",
        "timeout, try again",
        "judge precision",
        "The candidate passed. The alias champion points at s3://k2-data/t/export/abc.",
        made["corpus"].uri,
        made["corpus"].digest[:12],
        "58.0%",
    ):
        assert expected in page.text, expected
    charts = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert {"Training loss", "Learning rate", "Largest attention logit per layer", "Held-out accuracy"} <= charts
    assert {"Load of the busiest expert", "Mean reward", "Scores before and after"} <= charts
    assert {"Largest logit of each head", "Times each head was clipped", "Gradient norm"} <= charts
    assert "Largest spectral norm of a head's query and key rows" in charts


def test_the_page_is_self_contained_small_and_in_sections(store: Store, example_run: Example) -> None:
    example_run(store, "r2")
    html = render(store, "r2", "done")
    page = Page(html)
    assert len(html.encode()) <= MAX_BYTES
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert not [tag for tag, attributes in page.tags if {"src", "srcset"} & set(attributes) or tag == "link"]
    assert "url(" not in html
    assert "@import" not in html
    anchors = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert anchors == {str(a["id"]) for tag, a in page.tags if tag == "section" and "id" in a}


def test_hostile_text_stays_text(store: Store, example_run: Example) -> None:
    example_run(store, "r3", failing="rl")
    html = render(store, "r3", "failed")
    page = Page(html)
    assert "<script>alert('x')</script><img src=x" in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]


def test_a_failed_run_names_the_error_and_what_is_missing(store: Store, example_run: Example) -> None:
    example_run(store, "r4", failing="rl")
    text = Page(render(store, "r4", "failed")).text
    assert "rl failed" in text
    assert "the disk is full; free some" in text
    assert "run again, and the run continues from there" in text
    assert "Reinforcement learning: rl made nothing: it failed." in text
    assert "Evaluation: evaluate did not run." in text
    assert "Of 61 chunks" in text


def test_a_run_of_nothing_has_a_report(store: Store) -> None:
    text = Page(render(store, "r5", "interrupted")).text
    assert "No stage has started." in text
    assert "Lineage: no stage has finished." in text


def test_a_damaged_artifact_is_named_and_the_rest_is_shown(store: Store, example_run: Example) -> None:
    made = example_run(store, "r6")
    artifact = made["pretrain"]
    name = f"pretrain/{artifact.key}/{artifact.manifest.attempt}/report.json"
    store.put(name, b"{}")
    store.delete(f"corpus/{made['corpus'].key}/manifest.json")
    text = Page(render(store, "r6", "done")).text
    assert f"{artifact.uri}/report.json is corrupt" in text
    assert f"Lineage: {made['corpus'].uri}: no artifact is published there." in text
    assert "Of 61 chunks" in text


def test_examples_give_way_when_the_page_would_be_too_large(
    store: Store, example_run: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    example_run(store, "r7")
    full = len(render(store, "r7", "done").encode())
    bare = len(render(store, "r7", "done", examples=0).encode())
    monkeypatch.setattr("k2.monitoring.report.MAX_BYTES", (full + bare) // 2)
    assert bare < len(render(store, "r7", "done").encode()) < full


def test_bars_lie_on_the_clock_of_the_run() -> None:
    def record(stage: str, started: float, wall_s: float) -> dict[str, Any]:
        return {"stage": stage, "status": "done", "cached": stage == "corpus", "started": started, "wall_s": wall_s}

    rows = timeline([record("corpus", 100.0, 1.0), record("ingest", 101.0, 3.0), record("sft", 105.0, 5.0)])
    assert [(row["left"], row["width"]) for row in rows] == [(0.0, 10.0), (10.0, 30.0), (50.0, 50.0)]
    assert rows[0]["status"] == "cached"


def test_every_stage_has_a_view(store: Store, example_run: Example, tmp_path: Path) -> None:
    example_run(store, "r8", failing="ingest")
    views = collect(store, read_run(store, "r8"))
    assert views["corpus"].get("sources.scipy.documents") == 990
    assert views["corpus"].get("sources.scipy.nothing") is None
    assert views["ingest"].problem == "ingest made nothing: it failed"
    assert views["promote"].problem == "promote did not run"


def test_data_of_another_shape_cost_their_section_and_say_so(
    store: Store, example_run: Example, make_artifact: Callable[..., Artifact], caplog: pytest.LogCaptureFixture
) -> None:
    example_run(store, "r9")
    other = make_artifact("synthesize", {"report.json": b'{"accepted_example": {"messages": 3}}'})
    write_stage_record(store, "r9", {"stage": "synthesize", "status": "done", "artifact": other.uri})
    text = Page(render(store, "r9", "done")).text
    assert "This section: its data have another shape" in text
    assert "Of 61 chunks" in text
    assert "section Agentic trajectories cannot be made" in caplog.text
