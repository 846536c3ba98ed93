"""Nothing that was answered is asked again, and the batches after a kill are those of a run never killed."""

from collections.abc import Sequence

import pytest

from k2.generation.cache import CachedGenerator
from k2.generation.protocol import Completion, GenerationRequest, StreamCallback, Usage


class Work(dict[str, bytes]):
    """A work area in memory."""

    def names(self) -> list[str]:
        return sorted(self)

    def load(self, name: str) -> bytes | None:
        return self.get(name)

    def save(self, objects: dict[str, bytes]) -> None:
        self.update(objects)


class Echo:
    """Answers with the size of the batch, so that a change of batches shows; fails when it is told to."""

    identity = "echo"

    def __init__(self, fail_at: int = -1) -> None:
        self.batches: list[list[str]] = []
        self.fail_at = fail_at

    def generate(self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None):
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        self.batches.append([request.messages[0]["content"] for request in requests])
        return [Completion(f"{len(requests)}", (1, 2), (-0.5, -1.0), usage=Usage(1, 2)) for _ in requests]


def requests(text: str) -> list[GenerationRequest]:
    return [GenerationRequest([{"role": "user", "content": letter}]) for letter in text]


def test_a_killed_run_continues_with_the_same_batches() -> None:
    whole = Echo()
    expected = CachedGenerator(whole, Work(), 3).generate(requests("abcadefgh"))
    assert whole.batches == [["a", "b", "c"], ["d", "e"], ["f", "g", "h"]]

    work = Work()
    with pytest.raises(KeyboardInterrupt):
        CachedGenerator(Echo(fail_at=1), work, 3).generate(requests("abcadefgh"))
    again = Echo()
    assert CachedGenerator(again, work, 3).generate(requests("abcadefgh")) == expected
    assert again.batches == [["d", "e"], ["f", "g", "h"]]
    assert CachedGenerator(Echo(fail_at=0), work, 3).generate(requests("hgfa")) != []


def test_every_field_of_a_request_counts() -> None:
    base = GenerationRequest([{"role": "user", "content": "a"}])
    other = GenerationRequest([{"role": "user", "content": "a"}], seed=1)
    echo = Echo()
    CachedGenerator(echo, Work(), 8).generate([base, other, base])
    assert echo.batches == [["a", "a"]]


def test_a_failed_request_is_asked_again_by_the_next_run() -> None:
    class Failing(Echo):
        def generate(self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None):
            return [Completion("too long", finish_reason="error") for _ in requests]

    work, echo = Work(), Echo()
    CachedGenerator(Failing(), work, 8).generate(requests("a"))
    CachedGenerator(echo, work, 8).generate(requests("a"))
    assert echo.batches == [["a"]]
