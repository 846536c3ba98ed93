"""Stage `report`: the summary and the HTML page of a run, whatever became of it."""

import json

from k2.config.report import ReportConfig
from k2.execution.contract import Progress, StageResult
from k2.monitoring.report import Run, render_report
from k2.monitoring.run_record import elapsed, read_run, summary
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: ReportConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Write `summary.json` and `report.html`, into the artifact and into `runs/<run>/`.

    `changed` in the metrics is false when every other stage of the run was cached.
    """
    records = [record for record in read_run(output.store, config.run) if record["stage"] != "report"]
    about = Run(config.run, config.preset, config.status, elapsed(records))
    totals = summary(about.run, about.preset, about.status, about.wall_s, records)
    page = render_report(output.store, about, records, config.examples)
    contents = {"summary.json": json.dumps(totals, indent=1, sort_keys=True) + "\n", "report.html": page}
    for name, text in contents.items():
        output.path(name).write_text(text, encoding="utf-8")
        output.store.put(f"runs/{config.run}/{name}", text.encode())
    progress.update(1, 1, "pages")
    changed = not records or any(not record["cached"] for record in records)
    metrics = {"changed": changed, "bytes": len(page.encode())}
    return StageResult(output.publish(**metrics))
