"""Packing and reading in other divisions: every byte arrives, whatever the cuts."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from k2.distributed.index import Index, Part
from k2.distributed.pieces import ALIGNMENT, Piece, buckets
from k2.distributed.reshard import read
from k2.errors import StageError


class Memory:
    """Objects in a dict."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    def get(self, digest: str) -> bytes:
        return self.data[digest]


def divided(draw: st.DrawFn, tensors: dict[str, torch.Tensor], ranks: int) -> list[list[Piece]]:
    """The rows of all tensors, cut anywhere, on any rank."""
    found: list[list[Piece]] = [[] for _ in range(ranks)]
    for key, tensor in tensors.items():
        cuts = sorted(draw(st.sets(st.integers(0, len(tensor)), max_size=4)) | {0, len(tensor)})
        for start, stop in pairwise(cuts):
            owner = draw(st.integers(0, ranks - 1))
            found[owner].append(Piece(key, tensor[start:stop], tuple(tensor.shape), start))
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], list[list[Piece]], list[list[Piece]], int]:
    tensors = {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(1,), (7,), (5, 3), (8, 2, 3)]))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
        tensors[f"kind/{number}"] = torch.randint(0, 200, shape).to(dtype)
    saved = divided(draw, tensors, draw(st.integers(1, 3)))
    wanted = divided(draw, {key: torch.zeros_like(t) for key, t in tensors.items()}, draw(st.integers(1, 3)))
    return tensors, saved, wanted, draw(st.sampled_from([1, 16, 50, 10_000]))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_division_reads_what_any_other_wrote(
    case: tuple[dict[str, torch.Tensor], list[list[Piece]], list[list[Piece]], int],
) -> None:
    tensors, saved, wanted, limit = case
    memory, documents = Memory(), []
    for rank, pieces in enumerate(saved):
        index = Index()
        for number, bucket in enumerate(buckets(pieces, limit)):
            buffer = torch.zeros(bucket.size, dtype=torch.uint8)
            bucket.pack(buffer)
            name = f"{rank}-{number}"
            memory.data[name] = buffer.numpy().tobytes()
            assert all(offset % ALIGNMENT == 0 for offset in bucket.offsets)
            assert bucket.size <= limit or all(len(piece.tensor) == 1 for piece in bucket.pieces)
            for piece, offset in zip(bucket.pieces, bucket.offsets, strict=True):
                dtype = str(piece.tensor.dtype).removeprefix("torch.")
                index.add(piece.key, dtype, piece.shape, Part(piece.start, piece.stop, name, offset))
        documents.append(index.document())
    merged = Index.merged(documents)
    for pieces in wanted:
        read(memory, merged, pieces, 2)  # type: ignore[arg-type]
        for piece in pieces:
            assert torch.equal(piece.tensor, tensors[piece.key][piece.start : piece.stop])


def test_types_are_converted_on_the_way() -> None:
    memory, index = Memory(), Index()
    memory.data["a"] = torch.tensor([1.0, 2.5]).numpy().tobytes()
    index.add("weight/x", "float32", (2,), Part(0, 2, "a", 0))
    into = torch.zeros(2, dtype=torch.bfloat16)
    read(memory, index, [Piece("weight/x", into, (2,))], 1)  # type: ignore[arg-type]
    assert into.tolist() == [1.0, 2.5]


def test_what_is_missing_is_named() -> None:
    index = Index()
    index.add("weight/x", "float32", (4, 2), Part(0, 2, "a", 0))
    assert [part.start for _, part in index.parts("weight/x", (4, 2), 0, 2)] == [0]
    with pytest.raises(StageError, match="no rows 2 to 4 of weight/x"):
        list(index.parts("weight/x", (4, 2), 1, 4))
    with pytest.raises(StageError, match="no rows 0 to 1 of weight/y"):
        list(index.parts("weight/y", (4, 2), 0, 1))
    with pytest.raises(StageError, match=r"weight/x has the shape \[4, 2\], not \[4, 3\]"):
        list(index.parts("weight/x", (4, 3), 0, 1))
