"""Completions by content: what was generated once is never generated, or paid for, again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from k2.config.base import canonical_json
from k2.generation.protocol import Completion, GenerationRequest, Generator, StreamCallback, Usage
from k2.store.work import WorkArea

FOLDER = "completions/"


class CachedGenerator:
    """A `Generator` that keeps its answers in a stage's work area, one object per batch.

    Batches are cut by position and saved whole, so a run that was killed sends the same batches as one that was
    not: a backend whose rounding depends on the batch still gives the same bytes.
    """

    def __init__(self, generator: Generator, work: WorkArea, batch: int) -> None:
        """Wrap `generator`; `batch` requests are answered between two saves."""
        self.generator, self.work, self.batch = generator, work, batch
        self.identity = generator.identity
        self.known: dict[str, Completion] = {}
        for name in sorted(work.names()):
            if name.startswith(FOLDER):
                stored = json.loads(work.load(name) or b"{}")
                self.known |= {key: _completion(value) for key, value in stored.items()}

    def generate(
        self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None
    ) -> list[Completion]:
        """Answer every request, in order; only those never answered before reach the backend."""
        keys = [request_key(self.identity, request) for request in requests]
        for start in range(0, len(keys), self.batch):
            span = range(start, min(start + self.batch, len(keys)))
            missing = {keys[n]: n for n in reversed(span) if keys[n] not in self.known}
            self._answer({key: missing[key] for key in sorted(missing, key=missing.__getitem__)}, requests, stream)
        return [self.known[key] for key in keys]

    def _answer(
        self, missing: dict[str, int], requests: Sequence[GenerationRequest], stream: StreamCallback | None
    ) -> None:
        if not missing:
            return
        positions = list(missing.values())
        relay = None if stream is None else (lambda n, text: stream(positions[n], text))
        answers = self.generator.generate([requests[n] for n in positions], stream=relay)
        fresh = dict(zip(missing, answers, strict=True))
        self.known |= fresh
        kept = {key: asdict(answer) for key, answer in fresh.items() if answer.finish_reason != "error"}
        name = hashlib.sha256(canonical_json(sorted(fresh)).encode()).hexdigest()
        self.work.save({f"{FOLDER}{name}.json": json.dumps(kept, sort_keys=True).encode()})


def request_key(identity: str, request: GenerationRequest) -> str:
    """SHA-256 over everything that decides an answer."""
    return hashlib.sha256(canonical_json([identity, asdict(request)]).encode()).hexdigest()


def _completion(value: dict[str, Any]) -> Completion:
    sequences = {name: tuple(value[name]) for name in ("token_ids", "logprobs", "tool_calls")}
    return Completion(**{**value, **sequences, "usage": Usage(**value["usage"])})
