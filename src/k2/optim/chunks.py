"""Which matrices Muon works on together: runs of equal shape that fit the caches, whatever layers they come from."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from k2.optim.newton_schulz import chunk
from k2.optim.partition import Block


@dataclass(frozen=True)
class Piece:
    """Neighbouring matrices of a block: those from `start` on, `count` of them."""

    block: Block
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece's `[count, rows, columns]` view of the parameter, its gradient or its momentum."""
        view: Tensor = self.block.of(tensor)
        return view[self.start : self.start + self.count]


def total(pieces: list[Piece]) -> tuple[int, int, int]:
    """Matrices in all pieces, their rows and columns."""
    return (sum(piece.count for piece in pieces), *pieces[0].block.shape)


def equal_shapes(blocks: Iterable[Block], dtype: torch.dtype, device: torch.device) -> list[list[Piece]]:
    """Chunks of matrices of one shape each, whatever blocks they come from."""
    found: dict[tuple[int, int], list[list[Piece]]] = defaultdict(lambda: [[]])
    for block in blocks:
        chunks, limit, start = found[block.shape], chunk(block.shape, dtype, device), 0
        while start < block.count:
            room = limit - sum(piece.count for piece in chunks[-1])
            if room == 0:
                chunks.append([])
                room = limit
            count = min(room, block.count - start)
            chunks[-1].append(Piece(block, start, count))
            start += count
    return [pieces for chunks in found.values() for pieces in chunks]
