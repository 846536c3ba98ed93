"""Stage `rephrase`: rewrite good documents with an LLM and keep what is verified to say the same."""

import json

from k2.config.rephrase import RephraseConfig
from k2.data.documents import json_line, read_rows, write_rows
from k2.execution.contract import Progress, StageResult
from k2.generation.cache import CachedGenerator
from k2.generation.factory import build_generator
from k2.rephrase.embedding import Embedder
from k2.rephrase.generation import plan, rewrite_all
from k2.rephrase.results import all_documents, attempt_rows, metrics, report
from k2.rephrase.selection import choose
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: RephraseConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Publish all documents plus the rewrites, every attempt with its verdict, and the report.

    Raises:
        UserError: the generator or the embedding model is not available.
        StageError: the endpoint keeps failing.
    """
    source = inputs["documents"].path("documents.jsonl.zst")
    jobs = plan(choose(read_rows(source), config), config)
    if jobs:
        generator = CachedGenerator(build_generator(config.generator), output.work, config.save_requests)
        rewrite_all(jobs, generator, Embedder(), config, progress)

    write_rows(output.path("documents.jsonl.zst"), all_documents(read_rows(source), jobs, config.on_reject))
    with output.path("rewrites.jsonl").open("wb") as file:
        file.writelines(map(json_line, attempt_rows(jobs)))
    output.path("report.json").write_text(json.dumps(report(jobs), sort_keys=True))
    result = metrics(jobs)
    return StageResult(output.publish(**result))
