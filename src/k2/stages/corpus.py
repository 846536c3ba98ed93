"""Stage `corpus`: snapshot the raw text, so that everything after it is reproducible."""

import json

from k2.config.corpus import CorpusConfig
from k2.data.documents import write_rows
from k2.data.snapshot import Snapshot, collect, labelled_examples, require_text, write_shards
from k2.execution.contract import Progress, StageResult
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: CorpusConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Write `documents/*.jsonl.zst`, `labelled.jsonl.zst`, `problems.jsonl.zst` and `report.json`.

    Raises UserError for a corpus that does not exist or holds no text. Records that cannot be read are
    named in `problems.jsonl.zst` and counted in the report.
    """
    snapshot = Snapshot()
    folder = output.path("documents/00000.jsonl.zst").parent
    write_shards(collect(config, output.store, snapshot), folder, config.shard_bytes)
    require_text(config, snapshot)
    progress.update(snapshot.documents, snapshot.documents, "documents")
    write_rows(output.path("labelled.jsonl.zst"), labelled_examples(config))
    write_rows(output.path("problems.jsonl.zst"), (vars(problem) for problem in snapshot.problems))
    report = snapshot.report()
    output.path("report.json").write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    metrics = {"documents": snapshot.documents, "bytes": snapshot.bytes, "sources": snapshot.sources}
    if snapshot.problems:
        progress.event("unread_records", **report["problems"])
    return StageResult(output.publish(**metrics, problems=report["problems"]))
