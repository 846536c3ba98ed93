"""Batched orthogonalisation by Newton-Schulz, in the form that costs less for the shape.

Letters in shapes: N matrices, R rows, C columns, S the smaller of R and C.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]
"""a, b, c of X <- aX + b(XX^T)X + c(XX^T)^2 X."""

Shape = tuple[int, int, int]

MOONLIGHT: tuple[Polynomial, ...] = ((3.4445, -4.7750, 2.0315),) * 5
"""The five equal iterations of Moonlight (arXiv 2502.16982, section 2.1) and of torch.optim.Muon."""

RESTART = 2
"""Iterations of the Gram form between two evaluations of XX^T. Longer runs lose small singular values to bfloat16's
rounding and amplify the noise: after three, singular values of 426 came out of 16x32 matrices of power-law spectrum;
after two, none above 1.21 at any spectrum tried."""

CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
"""Matrices worked on at once, by device: what a CPU's caches hold, what fills a GPU."""

EPS = 1e-7
"""Smallest Frobenius norm that a matrix is divided by."""


def chunk(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int:
    """How many matrices of a shape are worth working on at once."""
    return max(1, CHUNK_BYTES[device.type] // (shape[0] * shape[1] * dtype.itemsize))


def orthogonalize(
    matrices: Tensor, polynomials: Sequence[Polynomial] = MOONLIGHT, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Replace the singular values of every matrix by values near one (0.68 to 1.14 once Moonlight's converged).

    Args:
        matrices: `[R, C]` or a batch `[N, R, C]`; zero matrices stay zero.
        polynomials: the iterations, one after another.
        dtype: type computed in and returned.
    """
    batch_NRC = matrices.reshape(-1, *matrices.shape[-2:])
    rows, columns = batch_NRC.shape[1:]
    out_NRC = torch.empty(batch_NRC.shape, dtype=dtype, device=batch_NRC.device)
    count = chunk((rows, columns), dtype, batch_NRC.device)
    workspace = Workspace([(min(count, len(batch_NRC)), rows, columns)], dtype, batch_NRC.device)
    for part, result in zip(torch.split(batch_NRC, count), torch.split(out_NRC, count), strict=True):
        workspace.input(*part.shape).copy_(part)
        result.copy_(workspace.orthogonalize(polynomials))
    return out_NRC.view(matrices.shape)


class Workspace:
    """Memory to orthogonalise batches in, again and again.

    It is kept because fresh memory for every product costs a CPU about a sixth of the time: its pages are cleared.
    A tall matrix is not transposed: its Gram matrix is X^T X, and the products come from the right.
    """

    def __init__(self, chunks: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> None:
        """Take the shapes `(N, R, C)` that will come."""
        values, squares = (max(sizes) for sizes in zip(*(_sizes(shape) for shape in chunks), strict=True))
        self._pair = torch.empty(2, values, dtype=dtype, device=device)
        self._four = torch.empty(4, squares, dtype=dtype, device=device)
        self._tall = self._long = False
        self._x_NRC = self._y_NRC = self._pair[0]

    def input(self, count: int, rows: int, columns: int) -> Tensor:
        """Where to write the next matrices, `[N, R, C]`."""
        side, long = sorted((rows, columns))
        self._tall, self._long = rows > columns, long >= 2 * side
        values, squares = _sizes((count, rows, columns))
        self._x_NRC, self._y_NRC = (flat[:values].view(count, rows, columns) for flat in self._pair)
        self._squares = [flat[:squares].view(count, side, side) for flat in self._four]
        return self._x_NRC

    def orthogonalize(self, polynomials: Sequence[Polynomial]) -> Tensor:
        """Run the iterations on what was written; the result is valid until the next `input`."""
        gram_NSS = self._gram()
        wide = torch.promote_types(gram_NSS.dtype, torch.float32)
        squared_N11 = gram_NSS.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=wide)[:, None, None].clamp_(min=EPS**2)
        norm_N11 = squared_N11.sqrt().to(gram_NSS.dtype)
        gram_NSS.div_(norm_N11).div_(norm_N11)  # by the norm that divides X: rounding its square would set them apart
        self._x_NRC.div_(norm_N11)
        # Multiplications of two iterations: 2 S^2 L + 5 S^3 through the Gram matrix, 4 S^2 L + 2 S^3 as published.
        (self._gram_form if self._long else self._direct_form)(polynomials)
        return self._x_NRC

    def _direct_form(self, polynomials: Sequence[Polynomial]) -> None:
        """The iteration as published."""
        for index, (a, b, c) in enumerate(polynomials):
            gram_NSS = self._gram() if index else self._squares[0]
            update_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c, out=self._squares[1])
            self._multiply(update_NSS, a)

    def _gram_form(self, polynomials: Sequence[Polynomial]) -> None:
        """The same iterations on the small Gram matrix: X <- PX with the product P of the factors aI + bG + cG^2."""
        for start in range(0, len(polynomials), RESTART):
            if start:
                self._gram()
            product_NSS, scale = self._product(polynomials[start : start + RESTART])
            self._multiply(product_NSS, scale)

    def _product(self, polynomials: Sequence[Polynomial]) -> tuple[Tensor, float]:
        """P - sI and s, the product of all a: a multiple of the identity on a bfloat16 diagonal would be rounded.

        All matrices here are polynomials of one Gram matrix, so they commute.
        """
        gram_NSS, y_NSS, product_NSS, spare_NSS = self._squares
        scale = 1.0
        for index, (a, b, c) in enumerate(polynomials):
            torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c, out=y_NSS)
            if index:
                torch.baddbmm(product_NSS, y_NSS, product_NSS, beta=a, out=spare_NSS).add_(y_NSS, alpha=scale)
                product_NSS, spare_NSS = spare_NSS, product_NSS
            else:
                product_NSS.copy_(y_NSS)
            scale *= a
            if index < len(polynomials) - 1:  # G <- ZGZ with Z = aI + Y
                torch.baddbmm(gram_NSS, y_NSS, gram_NSS, beta=a, out=spare_NSS)
                torch.baddbmm(spare_NSS, y_NSS, spare_NSS, beta=a, out=gram_NSS)
        return product_NSS, scale

    def _gram(self) -> Tensor:
        x_NRC = self._x_NRC
        left, right = (x_NRC.mT, x_NRC) if self._tall else (x_NRC, x_NRC.mT)
        return torch.bmm(left, right, out=self._squares[0])

    def _multiply(self, square_NSS: Tensor, scale: float) -> None:
        """X <- (scale I + square) X, from the other side when X is tall."""
        x_NRC = self._x_NRC
        left, right = (x_NRC, square_NSS) if self._tall else (square_NSS, x_NRC)
        torch.baddbmm(x_NRC, left, right, beta=scale, out=self._y_NRC)
        self._x_NRC, self._y_NRC = self._y_NRC, self._x_NRC


def _sizes(shape: Shape) -> tuple[int, int]:
    """Values in a batch, and in its Gram matrices."""
    count, rows, columns = shape
    return count * rows * columns, count * min(rows, columns) ** 2
