"""Chunk-wise autoregressive rewriting: chunk after chunk within a document, many documents at once.

K2 report section 2.2 and figure 4: split, rewrite each part with what came before as context, stitch.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2.config.rephrase import RephraseConfig
from k2.execution.contract import Progress
from k2.generation.protocol import Completion, GenerationRequest, Generator
from k2.rephrase.chunking import count_tokens, split
from k2.rephrase.embedding import Embedder
from k2.rephrase.fidelity import Verdict, verify
from k2.rephrase.prompts import Style, Turn, messages, style_for

# Most tokens of an answer: some, and so many for every word or punctuation mark of the source.
BASE_TOKENS, TOKENS_PER_PIECE = 12, 1.4


@dataclass(frozen=True)
class Attempt:
    """One answer of the model for one chunk, and the judgement on it."""

    chunk: int
    candidate: int
    source: str
    rewrite: str
    context: bool
    verdict: Verdict
    kept: bool = False


@dataclass
class Job:
    """One rewrite of one document in the making."""

    document: Mapping[str, Any]
    ordinal: int
    style: Style
    chunks: list[str]
    history: list[Turn] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.document['id']}#rewrite-{self.ordinal}"


def plan(documents: Sequence[Mapping[str, Any]], config: RephraseConfig) -> list[Job]:
    """The rewrites to make of `documents`: document by document, each rewrite in another style."""
    return [
        Job(document, ordinal, style_for(document["domain"], position + ordinal), chunks)
        for position, document in enumerate(documents)
        for chunks in [split(document["passage"], config.chunk_tokens)]
        for ordinal in range(config.rewrites_per_document)
    ]


def rewrite_all(
    jobs: Sequence[Job], generator: Generator, embedder: Embedder, config: RephraseConfig, progress: Progress
) -> None:
    """Fill in history and attempts of every job, in waves: the next chunk of each job of a group at once."""
    total = sum(len(job.chunks) for job in jobs)
    size = max(1, config.batch_requests // config.candidates)
    done = accepted = 0
    for start in range(0, len(jobs), size):
        group = jobs[start : start + size]
        for step in range(max(len(job.chunks) for job in group)):
            wave = [job for job in group if step < len(job.chunks)]
            accepted += _rewrite_wave(wave, step, generator, embedder, config)
            done += len(wave)
            progress.update(done, total, "chunks", accepted=accepted)


def stitch(job: Job, on_reject: str) -> str | None:
    """The rewritten document, or None when no chunk was accepted.

    The white space around each chunk is that of the source; a rejected chunk stays original or is left out.
    """
    if not any(turn.rewrite for turn in job.history):
        return None
    parts = [
        turn.source if turn.rewrite is None else _reframe(turn.source, turn.rewrite)
        for turn in job.history
        if turn.rewrite is not None or on_reject == "keep_original"
    ]
    return "".join(parts)


def _rewrite_wave(
    wave: Sequence[Job], step: int, generator: Generator, embedder: Embedder, config: RephraseConfig
) -> int:
    """Rewrite chunk `step` of every job; returns how many were accepted."""
    histories = [_recent(job.history, config.context_tokens) for job in wave]
    requests = [
        request
        for job, history in zip(wave, histories, strict=True)
        for request in _requests(job, step, history, config)
    ]
    answers = iter(generator.generate(requests))
    for job, history in zip(wave, histories, strict=True):
        completions = [next(answers) for _ in range(config.candidates)]
        attempts = list(_judge(job, step, completions, history, embedder, config))
        best = min(attempts, key=lambda attempt: (len(attempt.verdict.reasons), -attempt.verdict.similarity))
        job.attempts += [Attempt(**{**vars(attempt), "kept": attempt is best}) for attempt in attempts]
        job.history.append(Turn(best.source, best.rewrite if best.verdict.accepted else None))
    return sum(job.history[-1].rewrite is not None for job in wave)


def _requests(job: Job, step: int, history: Sequence[Turn], config: RephraseConfig) -> Iterator[GenerationRequest]:
    chunk = job.chunks[step]
    for candidate in range(config.candidates):
        yield GenerationRequest(
            messages(job.style, chunk, history),
            max_tokens=BASE_TOKENS + int(TOKENS_PER_PIECE * count_tokens(chunk)),
            # The likeliest answer is the best guess; samples are for the chunks where it fails.
            temperature=config.temperature if candidate or config.candidates == 1 else 0.0,
            top_p=config.top_p,
            seed=_seed(config.seed, job.id, step, candidate),
        )


def _judge(
    job: Job,
    step: int,
    completions: Sequence[Completion],
    history: Sequence[Turn],
    embedder: Embedder,
    config: RephraseConfig,
) -> Iterator[Attempt]:
    source = job.chunks[step]
    before = "".join(job.chunks[:step])
    written = "\n".join(turn.rewrite or turn.source for turn in job.history)
    for candidate, completion in enumerate(completions):
        if completion.finish_reason == "error":
            verdict = Verdict(0.0, ("generation_failed",))
            yield Attempt(step, candidate, source, "", bool(history), verdict)
            continue
        text = completion.text.strip()
        similarity = embedder.similarity(source, text)
        verdict = verify(source, text, similarity, config.fidelity, context=before, written=written)
        if completion.finish_reason == "length":
            verdict = Verdict(similarity, (*verdict.reasons, "cut_off"))
        yield Attempt(step, candidate, source, text, bool(history), verdict)


def _recent(history: Sequence[Turn], limit: int) -> list[Turn]:
    """The latest turns that fit in `limit` tokens, oldest first."""
    kept: list[Turn] = []
    for turn in reversed(history):
        limit -= count_tokens(turn.source) + count_tokens(turn.rewrite or "")
        if limit < 0:
            break
        kept.append(turn)
    return kept[::-1]


def _reframe(source: str, rewrite: str) -> str:
    lead, tail = re.match(r"\s*", source), re.search(r"\s*\Z", source)
    return (lead[0] if lead else "") + rewrite + (tail[0] if tail else "")


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
