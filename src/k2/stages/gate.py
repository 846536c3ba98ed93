"""Stage `gate`: compare the candidate with the champion and write down the decision."""

import json
from typing import Any

from k2.config.gate import GateConfig
from k2.evaluation.gate import Decision, Scores, decide, dump_scores, parse_scores, record_scores, recorded_scores
from k2.execution.contract import Progress, StageResult
from k2.store.aliases import read_alias
from k2.store.artifacts import Artifact, ArtifactWriter


def run(config: GateConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress) -> StageResult:
    """Decide whether the export should become the champion, and publish `decision.json`.

    `changed` in the metrics says whether the alias is about to move.

    Raises:
        UserError: the configuration names a score that was not measured.
    """
    export, candidate = inputs["export"], _candidate_scores(inputs["evaluation"])
    record_scores(output.store, export.digest, candidate)
    champion = read_alias(output.store, config.alias).artifact(output.store)
    champion_scores = None if champion is None else recorded_scores(output.store, champion.digest)
    if champion is not None and champion.digest == export.digest:
        decision = Decision(False, ["the candidate is the champion already"])
    else:
        decision = decide(config, candidate, champion_scores)
    document = {
        "alias": config.alias,
        "promote": decision.promote,
        "reasons": decision.reasons,
        "candidate": _side(export, candidate),
        "champion": None if champion is None else _side(champion, champion_scores or {}),
    }
    progress.event("gate", promote=decision.promote, reasons=decision.reasons)
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    output.path("decision.json").write_text(text)
    output.path("report.json").write_text(text)
    metrics = {"changed": decision.promote, "promote": decision.promote, "reasons": decision.reasons}
    return StageResult(output.publish(**metrics))


def _candidate_scores(evaluation: Artifact) -> Scores:
    document = evaluation.json("evaluation.json")
    return parse_scores(document["models"][document["final"]])


def _side(export: Artifact, scores: Scores) -> dict[str, Any]:
    return {"uri": export.uri, "digest": export.digest, "scores": dump_scores(scores)}
