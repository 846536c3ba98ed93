"""Batched orthogonalisation by Newton-Schulz, in the form that costs less for the shape.

Letters in shapes: N matrices, R rows, C columns, S the smaller of R and C.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from k2.kernels.cpu import newton_schulz as cpu
from k2.model.backend import kernels_for, runs_in_c
from k2.optim.schemes import Run, Scheme

Shape = tuple[int, int, int]

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Matrices worked on at once, by device: what a CPU's caches hold, what fills a GPU."""

EPS = 1e-7
"""Smallest Frobenius norm that a matrix is divided by."""


def chunk(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int:
    """How many matrices of a shape are worth working on at once."""
    return max(1, CHUNK_BYTES[device.type] // (shape[0] * shape[1] * dtype.itemsize))


def orthogonalize(matrices: Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Replace the singular values of every matrix by values near one: 0.68 to 1.14 by Moonlight's polynomials, 0.81 to
    1.19 by Polar Express's, where they were not too small.

    Args:
        matrices: `[R, C]` or a batch `[N, R, C]`; zero matrices stay zero.
        scheme: one of `k2.optim.schemes.SCHEMES`.
        dtype: type computed in and returned.
    """
    batch_NRC = matrices.reshape(-1, *matrices.shape[-2:])
    rows, columns = batch_NRC.shape[1:]
    out_NRC = torch.empty(batch_NRC.shape, dtype=dtype, device=batch_NRC.device)
    count = chunk((rows, columns), dtype, batch_NRC.device)
    workspace = Workspace([(min(count, len(batch_NRC)), rows, columns)], dtype, batch_NRC.device)
    for part, result in zip(torch.split(batch_NRC, count), torch.split(out_NRC, count), strict=True):
        workspace.input(*part.shape).copy_(part)
        result.copy_(workspace.orthogonalize(scheme))
    return out_NRC.view(matrices.shape)


class Workspace:
    """Memory to orthogonalise batches in, again and again.

    It is kept because fresh memory for every product costs a CPU about a sixth of the time: its pages are cleared. In C
    matrices need no more than themselves.
    A tall matrix is not transposed: its Gram matrix is X^T X, and the products come from the right.
    """

    def __init__(self, chunks: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> None:
        """Take the shapes `(N, R, C)` that will come."""
        chunks = list(chunks)
        values, squares = (max(sizes) for sizes in zip(*(_sizes(shape) for shape in chunks), strict=True))
        self._x_NRC = torch.empty(values, dtype=dtype, device=device)
        self._in_c = runs_in_c(self._x_NRC) and cpu.serves_newton_schulz(self._x_NRC, chunks)
        self._pair = [self._x_NRC] if self._in_c else [self._x_NRC, torch.empty_like(self._x_NRC)]
        self._four = torch.empty(4, 0 if self._in_c else squares, dtype=dtype, device=device)
        self._tall = False

    def input(self, count: int, rows: int, columns: int) -> Tensor:
        """Where to write the next matrices, `[N, R, C]`."""
        side = min(rows, columns)
        self._tall = rows > columns
        values, squares = _sizes((count, rows, columns))
        self._x_NRC, *others = (flat[:values].view(count, rows, columns) for flat in self._pair)
        if not self._in_c:
            (self._y_NRC,) = others
            self._squares = [flat[:squares].view(count, side, side) for flat in self._four]
        return self._x_NRC

    def orthogonalize(self, scheme: Scheme) -> Tensor:
        """Run the iterations on what was written; the result is valid until the next `input`."""
        if kernels := kernels_for(self._x_NRC):
            return cast(Tensor, kernels.newton_schulz(self._x_NRC, scheme))
        runs = scheme.runs_for(*sorted(self._x_NRC.shape[1:]))
        if self._in_c:
            return cpu.newton_schulz(self._x_NRC, runs, tight=scheme.tight)
        first, *others = runs
        self._normalize(self._gram(), scheme.tight)
        self._apply(*self._product(first, squared=scheme.tight))
        for run in others:
            self._gram()
            self._apply(*self._product(run))
        return self._x_NRC

    def _normalize(self, gram_NSS: Tensor, tight: bool) -> None:
        """Divide X by its norm and G by the norm's square; leaves the square of G behind if the norm needs it."""
        dtype, wide = gram_NSS.dtype, torch.promote_types(gram_NSS.dtype, torch.float32)
        # The Frobenius norm first, whatever follows: powers of G as it comes would underflow.
        squared_N11 = gram_NSS.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=wide)[:, None, None].clamp_(min=EPS**2)
        norm_N11 = squared_N11.sqrt_().to(dtype)
        gram_NSS.div_(norm_N11).div_(norm_N11)  # by what divides X: rounding its square would set them apart
        if tight:
            square_NSS = _symmetric(gram_NSS, gram_NSS, self._squares[1])
            rows_NS1 = torch.linalg.vector_norm(square_NSS, dim=-1, keepdim=True, dtype=wide)
            fourth_N11 = torch.linalg.vector_norm(rows_NS1, dim=-2, keepdim=True).clamp_(min=EPS)
            ratio_N11 = fourth_N11.pow(0.25).to(dtype)
            gram_NSS.div_(ratio_N11).div_(ratio_N11)
            square_NSS.div_(fourth_N11.to(dtype))
            norm_N11.mul_(ratio_N11)
        self._x_NRC.div_(norm_N11)

    def _product(self, run: Run, squared: bool = False) -> tuple[Tensor, float]:
        """P - sI and s for X <- PX, P the product of the factors aI + bG + cG^2; `squared` if G^2 is there already.

        A multiple of the identity on a bfloat16 diagonal would be rounded.
        """
        gram_NSS, first_NSS, second_NSS, out_NSS = self._squares
        a, b, c = run[0]
        if squared:
            first_NSS.mul_(c).add_(gram_NSS, alpha=b)
        else:
            _symmetric(gram_NSS, gram_NSS, first_NSS, gram_NSS, a=c, b=b)
        if len(run) == 1:
            return first_NSS, a
        # All matrices here are polynomials of one Gram matrix, so they commute: the next one is PGP.
        _symmetric(first_NSS, gram_NSS, out_NSS, gram_NSS, b=a)
        _symmetric(first_NSS, out_NSS, gram_NSS, out_NSS, b=a)
        next_a, b, c = run[1]
        _symmetric(gram_NSS, gram_NSS, second_NSS, gram_NSS, a=c, b=b)
        _symmetric(second_NSS, first_NSS, out_NSS, first_NSS, b=next_a)
        return out_NSS.add_(second_NSS, alpha=a), a * next_a

    def _gram(self) -> Tensor:
        x_NRC = self._x_NRC
        left, right = (x_NRC.mT, x_NRC) if self._tall else (x_NRC, x_NRC.mT)
        return _symmetric(left, right, self._squares[0])

    def _apply(self, square_NSS: Tensor, scale: float) -> None:
        """X <- (scale I + square) X, from the other side when X is tall."""
        x_NRC = self._x_NRC
        left, right = (x_NRC, square_NSS) if self._tall else (square_NSS, x_NRC)
        torch.baddbmm(x_NRC, left, right, beta=scale, out=self._y_NRC)
        self._x_NRC, self._y_NRC = self._y_NRC, self._x_NRC


def _symmetric(
    left_NSK: Tensor,
    right_NKS: Tensor,
    out_NSS: Tensor,
    added_NSS: Tensor | None = None,
    *,
    a: float = 1.0,
    b: float = 0.0,
) -> Tensor:
    """out = a left right + b added, for matrices that commute: the result is symmetric."""
    return torch.baddbmm(out_NSS if added_NSS is None else added_NSS, left_NSK, right_NKS, beta=b, alpha=a, out=out_NSS)


def _sizes(shape: Shape) -> tuple[int, int]:
    """Values in a batch, and in its Gram matrices."""
    count, rows, columns = shape
    return count * rows * columns, count * min(rows, columns) ** 2
