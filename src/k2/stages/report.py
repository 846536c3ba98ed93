"""Stage `report`: the summary and the HTML page of a run, whatever became of it."""

from k2.config.report import ReportConfig
from k2.execution.contract import Progress, StageResult
from k2.monitoring.report import publish_pages
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: ReportConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Write `summary.json` and `report.html`, into the artifact and into `runs/<run>/`.

    `changed` in the metrics is false when every other stage of the run was cached.
    """
    pages, records = publish_pages(output.store, config.run, config.preset, config.status, config.examples)
    for name, text in pages.items():
        output.path(name).write_text(text, encoding="utf-8")
    progress.update(1, 1, "pages")
    changed = not records or any(not record["cached"] for record in records)
    metrics = {"changed": changed, "bytes": len(pages["report.html"].encode())}
    return StageResult(output.publish(**metrics))
