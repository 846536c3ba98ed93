"""The loader loses no token, resumes exactly, and gives ranks the parts of one step."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.data.loader import IGNORE, ArrayCorpus, Batch, TokenLoader
from k2.data.packing import Stream, concatenate

documents_lengths = st.lists(st.integers(0, 23), min_size=1, max_size=25).filter(any)


def corpus(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Every token is its own index, so that a batch shows where each token came from."""
    ids = iter(range(sum(lengths)))
    return concatenate([[next(ids) for _ in range(length)] for length in lengths], 1 << 16)


def equal(left: Batch, right: Batch) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in vars(left))


@given(documents_lengths, st.integers(1, 4), st.integers(1, 17), st.integers(0, 12))
def test_every_epoch_feeds_each_token_once(lengths, batch_size, context_length, steps):
    tokens, offsets = corpus(lengths)
    loader = TokenLoader(ArrayCorpus(tokens, offsets), batch_size, context_length, seed=3)
    fed = [loader.next_batch().tokens_BL.ravel() for _ in range(steps)]
    left = loader._remaining()
    times = np.bincount(np.concatenate([*fed, left.locate(np.arange(len(left)))]))
    assert times.tolist() == [loader.epoch + 1] * len(tokens)


@given(documents_lengths, st.integers(1, 17), st.integers(0, 3))
def test_targets_and_documents_follow_from_the_tokens(lengths, context_length, seed):
    tokens, offsets = corpus(lengths)
    ends = set((offsets[1:] - 1).tolist())
    loader = TokenLoader(ArrayCorpus(tokens, offsets), 2, context_length, seed)
    for _ in range(4):
        batch = loader.next_batch()
        for row, targets, document in zip(batch.tokens_BL, batch.targets_BL, batch.document_BL, strict=True):
            expected_document = 0
            for i, token in enumerate(row.tolist()):
                if i and (row[i - 1] in ends or token != row[i - 1] + 1):
                    expected_document += 1
                assert document[i] == expected_document
                assert targets[i] == (IGNORE if token in ends else token + 1)


@given(documents_lengths, st.integers(1, 4), st.integers(0, 12), st.integers(0, 12), st.data())
@settings(max_examples=60)
def test_resuming_at_any_step_equals_an_uninterrupted_run(lengths, batch_size, before, after, data):
    """Through epoch boundaries and changes of the context length."""
    tokens, offsets = corpus(lengths)
    changes = data.draw(st.dictionaries(st.integers(0, 24), st.sampled_from([1, 3, 8, 13]), max_size=3))

    def step(loader: TokenLoader, number: int) -> Batch:
        if number in changes:
            loader.set_context_length(changes[number], batch_size)
        return loader.next_batch()

    straight = TokenLoader(ArrayCorpus(tokens, offsets), batch_size, 5, seed=7)
    batches = [step(straight, number) for number in range(before + after)]
    broken = TokenLoader(ArrayCorpus(tokens, offsets), batch_size, 5, seed=7)
    for number in range(before):
        step(broken, number)
    resumed = TokenLoader(ArrayCorpus(tokens, offsets), batch_size, 99, seed=7)
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    for number in range(before, before + after):
        assert equal(step(resumed, number), batches[number])
    assert resumed.state_dict() == straight.state_dict()


@given(documents_lengths, st.sampled_from([1, 2, 3, 6]), st.integers(1, 9))
def test_ranks_partition_the_step_of_one_process(lengths, world_size, context_length):
    tokens, offsets = corpus(lengths)
    single = TokenLoader(ArrayCorpus(tokens, offsets), 6, context_length, seed=1)
    ranks = [
        TokenLoader(ArrayCorpus(tokens, offsets), 6, context_length, 1, rank, world_size) for rank in range(world_size)
    ]
    for _ in range(5):
        parts = [loader.next_batch() for loader in ranks]
        whole = single.next_batch()
        assert all(
            np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
            for name in vars(whole)
        )
    assert all(loader.state_dict() == single.state_dict() for loader in ranks)


@given(documents_lengths, st.integers(1, 7), st.integers(1, 13))
def test_changing_the_context_length_loses_nothing(lengths, first, second):
    tokens, offsets = corpus(lengths)
    loader = TokenLoader(ArrayCorpus(tokens, offsets), 1, first, seed=2)
    fed = [loader.next_batch().tokens_BL.ravel() for _ in range(len(tokens) // first // 2)]
    loader.set_context_length(second, 1)
    left = loader._remaining()
    rest = left.locate(np.arange(len(left)))
    assert loader.epoch == 0
    assert np.array_equal(np.sort(np.concatenate([*fed, rest])), np.arange(len(tokens)))


def test_epochs_and_seeds_shuffle_differently():
    tokens, offsets = corpus([10] * 40)
    loader = TokenLoader(ArrayCorpus(tokens, offsets), 40, 10, seed=0)
    first, second = loader.next_batch(), loader.next_batch()
    other = TokenLoader(ArrayCorpus(tokens, offsets), 40, 10, seed=1).next_batch()
    assert not np.array_equal(first.tokens_BL, second.tokens_BL)
    assert not np.array_equal(first.tokens_BL, other.tokens_BL)
    assert loader.epoch == 1


def test_rows_of_a_long_document_do_not_follow_each_other():
    tokens, offsets = corpus([1000])
    rows = TokenLoader(ArrayCorpus(tokens, offsets), 100, 10, seed=0).next_batch().tokens_BL[:, 0]
    assert (np.diff(rows) == 10).mean() < 0.1


def test_state_of_another_corpus_is_refused():
    tokens, offsets = corpus([9, 9])
    state = TokenLoader(ArrayCorpus(tokens, offsets), 1, 4, seed=0).state_dict()
    with pytest.raises(ValueError, match="does not fit"):
        TokenLoader(ArrayCorpus(tokens, offsets), 1, 4, seed=1).load_state_dict(state)


def test_empty_corpus_and_uneven_ranks_are_refused():
    tokens, offsets = corpus([3])
    with pytest.raises(ValueError, match="no tokens"):
        TokenLoader(ArrayCorpus(tokens[:0], offsets[:1]), 1, 4, seed=0)
    with pytest.raises(ValueError, match="multiple of world_size"):
        TokenLoader(ArrayCorpus(tokens, offsets), 3, 4, seed=0, world_size=2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.data())
def test_slices_equal_indexing(lengths, data):
    starts = np.asarray([100 * i for i in range(len(lengths))])
    stream = Stream.of(starts, np.asarray(lengths))
    flat = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    begins = np.asarray(data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=5)))
    length = data.draw(st.integers(1, 12))
    piece = stream.slices(begins, length)
    expected = np.concatenate([flat[begin : begin + length] for begin in begins])
    assert np.array_equal(piece.locate(np.arange(len(piece))), expected)


def test_token_width_follows_the_vocabulary():
    assert concatenate([[1]], 1 << 16)[0].dtype == np.uint16
    assert concatenate([[1]], (1 << 16) + 1)[0].dtype == np.uint32
    assert concatenate([], 10)[1].tolist() == [0]
