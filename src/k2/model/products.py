"""Products of few tokens with resident matrices, where reading the matrices is the work.

One token times a matrix is a weighted sum of the matrix's rows. PyTorch's kernel for such sums, made for embedding
tables, reads a cold matrix two to five times as fast as a general product does, and picks the rows of chosen experts
by itself. With more tokens a general product wins. Bfloat16 on a CPU is `k2.kernels.cpu.decode`'s where C runs.

Letters in shapes: T tokens, I inputs, O outputs, W width of a block of outputs, N rows of a table, E experts,
P (token, expert) pairs.
"""

from functools import cache

import torch
from torch import Tensor

SUM_TOKENS = 2  # up to here a sum of rows is faster than a general product
BLOCK = 256  # outputs of one sum: a row of so many bfloat16 values streams best
SUMMED = (torch.float32, torch.bfloat16)  # what the kernel is made for


class Product:
    """x [T, I] times the transpose of one weight [O, I]."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.outputs, self.inputs = weight_OI.shape
        self.weight_IO = weight_OI.T
        self.sum_tokens = SUM_TOKENS if sums(weight_OI) else 0
        if self.sum_tokens:
            width = self.outputs if self.outputs % BLOCK else BLOCK
            self.blocks = self.outputs // width
            self.table_NW = weight_OI.view(self.blocks, width, -1).transpose(1, 2).flatten(0, 1).contiguous()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        tokens = len(x_TI)
        if tokens > self.sum_tokens:
            return torch.mm(x_TI, self.weight_IO)
        weights = x_TI if self.blocks == 1 else x_TI.repeat(1, self.blocks)
        rows, starts = _whole_table(tokens, self.blocks, self.inputs)
        return _sum(self.table_NW, rows, starts, weights).view(tokens, self.outputs)


class ExpertProducts:
    """Each row times the matrix of its expert, from a table [E, I, O]; rows are ordered by expert."""

    def __init__(self, table_EIO: Tensor) -> None:
        self.table_EIO, self.table_NO = table_EIO, table_EIO.flatten(0, 1)

    def sums(self, experts_P: Tensor, x_PI: Tensor) -> Tensor:
        """Few rows: one sum each, [P, O]."""
        return _sum(self.table_NO, self._rows(experts_P), _starts(len(experts_P), x_PI.shape[1]), x_PI)

    def sum(self, experts_P: Tensor, x_PI: Tensor) -> Tensor:
        """The sum over all rows, [1, O]."""
        return _sum(self.table_NO, self._rows(experts_P), _starts(1, 0), x_PI)

    def segments(self, counts: list[int], x_PI: Tensor) -> Tensor:
        """Many rows, of which expert e has `counts[e]`: a product each, [P, O]."""
        pieces = zip(x_PI.split_with_sizes(counts), self.table_EIO, counts, strict=False)
        return torch.cat([torch.mm(piece, matrix) for piece, matrix, count in pieces if count])

    def _rows(self, experts_P: Tensor) -> Tensor:
        inputs = self.table_EIO.shape[1]
        return torch.add(_starts(inputs, 1), experts_P[:, None], alpha=inputs).view(-1)


@cache
def _starts(count: int, step: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count) * step


@cache
def _whole_table(tokens: int, blocks: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Every row of a table, once for each token, and where the rows of each sum start."""
    with torch.inference_mode(False):
        return torch.arange(blocks * inputs).repeat(tokens), torch.arange(tokens * blocks) * inputs


def _sum(table_NO: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: sum i takes `rows[starts[i]:starts[i + 1]]`."""
    result: Tensor = torch.embedding_bag(table_NO, rows, starts, False, 0, False, weights.view(-1))[0]
    return result


def sums(weight: Tensor) -> bool:
    """Whether products of few tokens with such a weight are sums of its rows."""
    return weight.device.type == "cpu" and weight.dtype in SUMMED
