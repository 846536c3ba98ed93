"""Samples that join and leave while others are generated, as a server's do."""

import pytest
import torch

from k2.model.generate import Engine, Sample, Session
from k2.model.sampling import SamplingConfig
from tests.model.reference import TINY, build

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 1, 4, 1, 5, 9, 2, 6], [50, 60]]
CONFIGS = [SamplingConfig(limit, seed=4) for limit in (9, 12, 3, 6)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(build(TINY))


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids for sample in samples]


def finish(session: Session) -> list[tuple[int, int]]:
    ended = []
    while session.busy:
        ended += session.advance()
    return ended


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_samples_that_join_later_are_those_of_a_call_of_their_own(engine: Engine, rows: int) -> None:
    alone = [tokens(engine.generate([p], 2, c)[0]) for p, c in zip(PROMPTS, CONFIGS, strict=True)]
    session = Session(engine, rows, 24)
    found = []
    ended = []
    for number, (prompt, config) in enumerate(zip(PROMPTS, CONFIGS, strict=True)):
        found.append(session.submit(number, prompt, 2, config))
        ended += session.advance()
        ended += session.advance()
    ended += finish(session)
    assert [tokens(samples) for samples in found] == alone
    assert sorted(ended) == [(number, sample) for number in range(4) for sample in range(2)]


def test_an_abandoned_prompt_gives_its_rows_to_others(engine: Engine) -> None:
    session = Session(engine, 2, 60)
    long = session.submit(0, PROMPTS[0], 3, SamplingConfig(50))
    session.advance()
    for sample in range(3):
        session.abandon(0, sample)
    kept = session.submit(1, PROMPTS[1], 1, CONFIGS[1])
    ended = finish(session)
    assert tokens(kept) == tokens(engine.generate([PROMPTS[1]], 1, CONFIGS[1])[0])
    assert [len(sample.token_ids) for sample in long] == [2, 2, 0]  # one token more, and the third never began
    assert ended == [(0, 0), (0, 1), (1, 0)]


def test_a_session_that_was_idle_takes_new_work(engine: Engine) -> None:
    session = Session(engine, 3, 24)
    assert not session.busy
    for number in range(3):
        samples = session.submit(number, PROMPTS[2], 1, CONFIGS[0])
        finish(session)
        assert tokens(samples) == tokens(engine.generate([PROMPTS[2]], 1, CONFIGS[0])[0])
    assert torch.isfinite(session.decoder.cache.values_NSLC).all()
