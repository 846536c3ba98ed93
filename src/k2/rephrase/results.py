"""What the rephrase stage writes: documents, every attempt, metrics and the report's tables."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from k2.rephrase.generation import Attempt, Job, stitch

HISTOGRAM_BINS = 20
EXAMPLES = 4
EXAMPLE_CHARACTERS = 600

Row = Mapping[str, Any]


def all_documents(originals: Iterable[Row], jobs: Sequence[Job], on_reject: str) -> Iterator[Row]:
    """The originals as they came, then every rewrite with at least one accepted chunk."""
    yield from originals
    for job in jobs:
        text = stitch(job, on_reject)
        if text is not None:
            document = {name: job.document[name] for name in ("domain", "source")}
            yield {**document, "id": job.id, "text": text, "origin": job.document["id"], "style": job.style.name}


def attempt_rows(jobs: Sequence[Job]) -> Iterator[Row]:
    """One row for every answer of the model, kept or not."""
    for job in jobs:
        for attempt in job.attempts:
            yield {
                "id": job.document["id"],
                "ordinal": job.ordinal,
                "domain": job.document["domain"],
                "style": job.style.name,
                "chunk": attempt.chunk,
                "chunks": len(job.chunks),
                "candidate": attempt.candidate,
                "context": attempt.context,
                "source": attempt.source,
                "rewrite": attempt.rewrite,
                "similarity": attempt.verdict.similarity,
                "accepted": attempt.verdict.accepted,
                "kept": attempt.kept and attempt.verdict.accepted,
                "reasons": list(attempt.verdict.reasons),
            }


def metrics(jobs: Sequence[Job]) -> dict[str, Any]:
    """Counts over chunks; a chunk is judged by its best attempt, `rewrites` counts every answer of the model."""
    chosen = [attempt for job in jobs for attempt in job.attempts if attempt.kept]
    accepted = sum(attempt.verdict.accepted for attempt in chosen)
    similarities = [attempt.verdict.similarity for attempt in chosen]
    multi = {job.document["id"] for job in jobs if len(job.chunks) > 1}
    return {
        "documents": len({job.document["id"] for job in jobs}),
        "chunks": len(chosen),
        "accepted": accepted,
        "rejected": len(chosen) - accepted,
        "mean_similarity": round(sum(similarities) / max(1, len(similarities)), 4),
        "rewrites": sum(len(job.attempts) for job in jobs),
        "reasons": dict(sorted(Counter(r for attempt in chosen for r in attempt.verdict.reasons).items())),
        "multi_chunk_documents": len(multi),
        "context_chunks": sum(attempt.context for attempt in chosen),
        "math_chunks": sum(len(job.chunks) for job in jobs if job.document["domain"] == "math"),
        "rewritten_documents": sum(stitch(job, "keep_original") is not None for job in jobs),
    }


def report(jobs: Sequence[Job]) -> dict[str, Any]:
    """Metrics, a histogram of similarity over all attempts, and examples of both verdicts."""
    chosen = [(job, attempt) for job in jobs for attempt in job.attempts if attempt.kept]
    accepted = [pair for pair in chosen if pair[1].verdict.accepted]
    rejected = [pair for pair in chosen if not pair[1].verdict.accepted]
    return {
        "metrics": metrics(jobs),
        "similarity_histogram": _histogram([a.verdict.similarity for job in jobs for a in job.attempts]),
        "accepted_examples": [_example(*pair) for pair in accepted[:EXAMPLES]],
        "rejected_examples": [_example(*pair) for pair in rejected[:EXAMPLES]],
    }


def _histogram(similarities: Sequence[float]) -> dict[str, list[float]]:
    """Counts over equal bins of [0, 1]; negative cosines fall into the first."""
    counts = Counter(min(HISTOGRAM_BINS - 1, max(0, int(value * HISTOGRAM_BINS))) for value in similarities)
    edges = [n / HISTOGRAM_BINS for n in range(HISTOGRAM_BINS + 1)]
    return {"edges": edges, "counts": [counts[n] for n in range(HISTOGRAM_BINS)]}


def _example(job: Job, attempt: Attempt) -> dict[str, Any]:
    return {
        "id": job.document["id"],
        "style": job.style.name,
        "source": attempt.source.strip()[:EXAMPLE_CHARACTERS],
        "rewrite": attempt.rewrite[:EXAMPLE_CHARACTERS],
        "similarity": attempt.verdict.similarity,
        "reasons": list(attempt.verdict.reasons),
    }
