"""One pass over the data, whatever the ranks do: proved by the ledger, and the ledger by the tokens themselves."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.data.ledger import Ledger, Span
from k2.data.loader import TokenLoader
from k2.data.mixture import Mixture
from k2.errors import StageError

BATCH, LENGTH = 12, 5


def corpus(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of these lengths; every token is its own number."""
    return np.arange(sum(lengths), dtype=np.uint32), np.cumsum([0, *lengths])


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=12, max_size=30),
    runs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 5)), min_size=1, max_size=6),
    longer=st.integers(0, 6),
)
def test_no_token_is_read_twice_or_left_out_when_ranks_change(
    lengths: list[int], runs: list[tuple[int, int]], longer: int
) -> None:
    tokens, offsets = corpus(lengths)
    state: dict[str, Any] | None = None
    ledger, seen = Ledger(), Counter[tuple[int, int]]()
    alone, order = TokenLoader(tokens, offsets, BATCH, LENGTH, seed=3), []
    for number, (ranks, steps) in enumerate(runs):
        loaders = [TokenLoader(tokens, offsets, BATCH, LENGTH, 3, rank, ranks) for rank in range(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
            if number == longer:
                loader.set_context_length(2 * LENGTH, BATCH)
        if number == longer:
            alone.set_context_length(2 * LENGTH, BATCH)
        for _ in range(steps):
            batches = [loader.next_batch().tokens_BL for loader in loaders]
            for loader, batch in zip(loaders, batches, strict=True):
                ledger.add(loader.read)
                epochs = np.repeat([s.epoch for s in loader.read], [s.stop - s.start for s in loader.read])
                seen.update((int(epoch), int(token)) for epoch, row in zip(epochs, batch, strict=True) for token in row)
            order.append(np.array_equal(np.concatenate(batches), alone.next_batch().tokens_BL))
        states = [loader.state_dict() for loader in loaders]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert all(order)
    ledger.check()
    assert Ledger.merged([ledger.state_dict()]).spans == ledger.spans
    read = Counter(token for _, token in seen.elements())
    times = [read[int(token)] for token in tokens]
    assert max(times) - min(times) <= 2  # what is too short for a row waits for the next epoch


def test_every_token_is_read_once_in_the_first_epoch() -> None:
    tokens, offsets = corpus([7, 30, 1, 12, 10])
    loader, ledger, seen = TokenLoader(tokens, offsets, 4, LENGTH, 0), Ledger(), []
    for _ in range(3):
        seen += loader.next_batch().tokens_BL.flatten().tolist()
        ledger.add(loader.read)
    ledger.check()
    assert ledger.spans == [Span(0, 1, 0, 12, 12)]
    assert sorted(seen) == tokens.tolist()


def test_what_was_read_twice_or_left_out_is_named() -> None:
    ledger = Ledger([Span(0, 1, 0, 4, 20), Span(0, 1, 8, 12, 20)])
    with pytest.raises(StageError, match="rows 4 to 8 of epoch 0, phase 1 were left out"):
        ledger.check()
    with pytest.raises(StageError, match="rows 3 to 5 of epoch 0, phase 1 were read twice"):
        Ledger.merged([ledger.state_dict(), [[0, 1, 3, 5, 20]]])
    ledger = Ledger([Span(0, 1, 0, 19, 20), Span(1, 1, 0, 1, 20)])
    with pytest.raises(StageError, match="rows 19 to 20 of epoch 0, phase 1 were left out"):
        ledger.check()


@settings(max_examples=25, deadline=None)
@given(
    shares=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    runs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_mixtures_hold_their_proportions_and_their_order_on_any_ranks(
    shares: tuple[int, int, int], runs: list[tuple[int, int]]
) -> None:
    weights = dict(zip("abc", map(float, shares), strict=True))
    base = {name: 10_000 * number for number, name in enumerate("abc")}

    def mixture(rank: int, ranks: int) -> Mixture:
        corpora = {}
        for name in "cab":
            tokens, offsets = corpus([30, 50, 20])
            corpora[name] = TokenLoader(tokens + base[name], offsets, 0, LENGTH, seed=1)
        return Mixture(corpora, weights, BATCH, rank, ranks)

    alone, state, rows = mixture(0, 1), None, 0
    ledgers = {name: Ledger() for name in "abc"}
    for ranks, steps in runs:
        parts = [mixture(rank, ranks) for rank in range(ranks)]
        for part in parts:
            if state is not None:
                part.load_state_dict(state)
        for _ in range(steps):
            expected = alone.next_batch().tokens_BL
            found = [part.next_batch().tokens_BL for part in parts]
            assert np.array_equal(np.concatenate(found), expected)
            rows += BATCH
            for part in parts:
                for name, spans in part.read.items():
                    ledgers[name].add(spans)
        state = parts[0].state_dict()
    for name, ledger in ledgers.items():
        ledger.check()
        assert abs(alone.given[name] - rows * weights[name] / sum(shares)) < 1.5


def test_mixtures_that_make_no_sense_are_refused() -> None:
    loader = TokenLoader(*corpus([10, 20]), 0, LENGTH, seed=1)
    for weights, size, ranks in (({"a": 0.0}, 4, 1), ({"b": 1.0}, 4, 1), ({"a": 1.0}, 3, 2)):
        with pytest.raises(ValueError, match=r"must be|need positive"):
            Mixture({"a": loader}, weights, size, 0, ranks)
    mixture = Mixture({"a": loader}, {"a": 1.0}, 4)
    with pytest.raises(ValueError, match="does not fit"):
        mixture.load_state_dict({"given": {}, "corpora": {"b": {}}})
