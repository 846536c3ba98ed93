"""What Kubeflow's UI shows of a stage beside its metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2.store.artifacts import Artifact


def show_judgement(made: Artifact, output: Any) -> None:
    """The verdicts of synthesis' judge against the mistakes that were injected; nothing where none were.

    Args:
        made: artifact of `synthesize`.
        output: KFP's ClassificationMetrics.
    """
    matrix = made.json("report.json")["judge_confusion"]
    if any(map(any, matrix)):
        output.log_confusion_matrix(["sound", "flawed"], matrix)


def show_decision(made: Artifact, output: Any) -> None:
    """The gate's decision with its reasons, and the scores of candidate and champion side by side.

    Args:
        made: artifact of `gate`.
        output: KFP's Markdown.
    """
    decision = made.json("decision.json")
    candidate, champion = decision["candidate"]["scores"], (decision["champion"] or {}).get("scores", {})
    verdict = "becomes" if decision["promote"] else "does not become"
    lines = [f"# The candidate {verdict} `{decision['alias']}`", "", *(f"- {each}" for each in decision["reasons"]), ""]
    lines += ["| score | candidate | champion | better |", "| --- | --- | --- | --- |"]
    for name, score in sorted(candidate.items()):
        lines.append(f"| {name} | {_measured(score)} | {_measured(champion.get(name))} | {score['better']} |")
    Path(output.path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _measured(score: Mapping[str, Any] | None) -> str:
    return f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})" if score else "not measured"
