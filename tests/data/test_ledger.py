"""One pass over the data, whatever the ranks do: proved by the ledger, and the ledger by the tokens themselves."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.data.ledger import Ledger, Span
from k2.data.loader import ArrayCorpus, TokenLoader
from k2.data.mixture import Mixture
from k2.data.prefetch import Prefetch
from k2.data.shards import write_shards
from k2.data.streaming import stream
from k2.errors import StageError

BATCH, LENGTH = 12, 5
DOMAINS = ("code", "math", "web")


def corpus(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of these lengths; every token is its own number."""
    return np.arange(sum(lengths), dtype=np.uint32), np.cumsum([0, *lengths])


class Folder:
    """Files on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        return self.read(name)[start : start + length]


def in_shards(lengths: list[int], folder: Path, shard_tokens: int) -> tuple[dict[str, Any], Folder]:
    """The documents of `corpus`, the domains taking turns, in shards; their index and where they are."""
    tokens, offsets = corpus(lengths)
    texts = [tokens[start:end].tolist() for start, end in pairwise(offsets)]
    documents = ((DOMAINS[number % 3], ids) for number, ids in enumerate(texts))
    return write_shards(documents, 1 << 20, folder, shard_tokens), Folder(folder)


def mixture(shards: tuple[dict[str, Any], Folder], weights: dict[str, float], rank: int, ranks: int) -> Mixture:
    corpora = stream(*shards, limit_bytes=1000)
    loaders = {name: TokenLoader(corpora[name], 0, LENGTH, 3) for name in weights}
    return Mixture(loaders, weights, BATCH, rank, ranks)


runs = st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 6)), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=12, max_size=30),
    shard_tokens=st.sampled_from([1, 30, 90, 10_000]),
    shares=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    runs=runs,
    longer=st.integers(0, 5),
    killed=st.integers(0, 3),
)
def test_no_document_is_seen_twice_or_skipped_when_ranks_change_and_are_killed(
    lengths: list[int], shard_tokens: int, shares: tuple[int, int, int], runs: list[tuple[int, int]], longer: int,
    killed: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Every run continues another's checkpoint on other ranks, after `killed` steps that nobody saved."""
    shards = in_shards(lengths, tmp_path_factory.mktemp("shards"), shard_tokens)
    weights = dict(zip(DOMAINS, map(float, shares), strict=True))
    alone, state, ledger = mixture(shards, weights, 0, 1), None, Ledger()
    seen: Counter[int] = Counter()
    for number, (ranks, steps) in enumerate(runs):
        loaders = [Prefetch(mixture(shards, weights, rank, ranks), ahead=5) for rank in range(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
            if number == longer:
                loader.set_context_length(2 * LENGTH, BATCH)
        if number == longer:
            alone.set_context_length(2 * LENGTH, BATCH)
        for _ in range(steps):
            batches = [loader.next_batch().tokens_BL for loader in loaders]
            for loader in loaders:
                ledger.add(loader.read)
            whole = np.concatenate(batches)
            assert np.array_equal(whole, alone.next_batch().tokens_BL)
            seen.update(whole.flatten().tolist())
        states = [loader.state_dict() for loader in loaders]
        assert all(each == states[0] for each in states)
        state = states[0]
        for _ in range(killed):
            loaders[0].next_batch()
    ledger.check()
    check_passes(lengths, seen, ledger)


def check_passes(lengths: list[int], seen: Counter[int], ledger: Ledger) -> None:
    """Tokens of a domain were seen as often as its windows were begun, or once less."""
    _, offsets = corpus(lengths)
    epochs = {span.corpus: span.window for span in ledger.spans}
    for number, domain in enumerate(DOMAINS):
        times = [seen[token] for document in range(number, len(lengths), 3)
                 for token in range(offsets[document], offsets[document + 1])]  # fmt: skip
        assert max(times) <= epochs.get(domain, -1) + 1
        assert max(times) - min(times) <= 2  # what is too short for a row waits for the next window


def test_every_token_is_read_once_in_the_first_epoch() -> None:
    tokens, offsets = corpus([7, 30, 1, 12, 10])
    loader, ledger, seen = TokenLoader(ArrayCorpus(tokens, offsets, "all"), 4, LENGTH, 0), Ledger(), []
    for _ in range(3):
        seen += loader.next_batch().tokens_BL.flatten().tolist()
        ledger.add(loader.read)
    ledger.check()
    assert ledger.spans == [Span("all", 0, 1, 0, 12, 12)]
    assert ledger.rows == 12
    assert sorted(seen) == tokens.tolist()


def test_shards_are_one_epoch_in_an_order_that_the_seed_shuffles(tmp_path: Path) -> None:
    corpora = stream(*in_shards([10] * 60, tmp_path, 50), limit_bytes=0)
    assert {name: each.windows for name, each in corpora.items()} == dict.fromkeys(DOMAINS, 4)
    orders = set()
    for seed in range(5):
        loader = TokenLoader(corpora["web"], 20, 10, seed)
        first, second = (loader.next_batch().tokens_BL[:, 0].tolist() for _ in range(2))
        assert sorted(first) == sorted(second) == list(range(20, 600, 30))
        orders |= {tuple(first), tuple(second)}
    assert len(orders) == 10


def test_what_was_read_twice_or_left_out_is_named() -> None:
    ledger = Ledger([Span("a", 0, 1, 0, 4, 20), Span("a", 0, 1, 8, 12, 20)])
    with pytest.raises(StageError, match="rows 4 to 8 of a window 0, phase 1 were left out"):
        ledger.check()
    with pytest.raises(StageError, match="rows 3 to 5 of a window 0, phase 1 were read twice"):
        Ledger.merged([ledger.state_dict(), [["a", 0, 1, 3, 5, 20]]])
    for spans, message in (
        ([Span("a", 0, 1, 0, 19, 20), Span("a", 1, 1, 0, 1, 20)], "rows 19 to 20 of a window 0, phase 1 were"),
        ([Span("a", 0, 1, 5, 20, 20)], "rows 0 to 5 of a window 0, phase 1 were"),
        ([Span("a", 0, 1, 0, 20, 20), Span("b", 1, 1, 0, 1, 20)], "b windows 0 to 1 were"),
        ([Span("a", 0, 1, 0, 20, 20), Span("a", 2, 1, 0, 1, 20)], "a windows 1 to 2 were"),
    ):
        with pytest.raises(StageError, match=message):
            Ledger(spans).check()
    # A longer context cut what was left, and a window was too short for a row.
    Ledger([Span("a", 0, 1, 0, 9, 20), Span("a", 0, 2, 0, 5, 5), Span("a", 1, 1, 0, 0, 0), Span("a", 2, 1, 0, 1, 9)])


@settings(max_examples=25, deadline=None)
@given(shares=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), steps=st.integers(1, 12))
def test_mixtures_hold_their_proportions(shares: tuple[int, int, int], steps: int) -> None:
    weights = dict(zip("abc", map(float, shares), strict=True))
    loaders = {name: TokenLoader(ArrayCorpus(*corpus([30, 50, 20]), name), 0, LENGTH, 1) for name in "cab"}
    whole = Mixture(loaders, weights, BATCH)
    ledger = Ledger()
    for step in range(1, steps + 1):
        whole.next_batch()
        ledger.add(whole.read)
        for name, share in weights.items():
            assert abs(whole.given[name] - step * BATCH * share / sum(shares)) < 1.5
    ledger.check()
    assert ledger.rows == steps * BATCH


def test_every_rank_gets_of_every_corpus() -> None:
    """Or the experts of one domain would be busy on one rank only."""
    for rank in range(3):
        loaders = {name: TokenLoader(ArrayCorpus(*corpus([50]), name), 0, LENGTH, 1) for name in "ab"}
        part = Mixture(loaders, {"a": 1.0, "b": 1.0}, BATCH, rank, 3)
        part.next_batch()
        assert [(span.corpus, span.stop - span.start) for span in part.read] == [("a", 2), ("b", 2)]


def test_mixtures_that_make_no_sense_are_refused() -> None:
    loader = TokenLoader(ArrayCorpus(*corpus([10, 20])), 0, LENGTH, seed=1)
    for weights, size, ranks in (({"a": 0.0}, 4, 1), ({"b": 1.0}, 4, 1), ({"a": 1.0}, 3, 2)):
        with pytest.raises(ValueError, match=r"must be|need positive"):
            Mixture({"a": loader}, weights, size, 0, ranks)
    mixture = Mixture({"a": loader}, {"a": 1.0}, 4)
    with pytest.raises(ValueError, match="does not fit"):
        mixture.load_state_dict({"given": {}, "corpora": {"b": {}}})
