"""The polynomials that Newton-Schulz iterates. Torch-free."""

from dataclasses import dataclass

Polynomial = tuple[float, float, float]
"""a, b, c of X <- aX + b(XX^T)X + c(XX^T)^2 X."""

Run = tuple[Polynomial] | tuple[Polynomial, Polynomial]
"""One iteration, or two that a long matrix makes on its Gram matrix without looking at X between them."""


@dataclass(frozen=True)
class Scheme:
    """Which polynomials are applied one after another.

    runs: the iterations. Bfloat16's rounding of a Gram matrix grows with the square of what the first iteration of a
        run multiplies small singular values by, so only gentle ones may come first in a pair.
    tight: divide X by its Schatten 8-norm, which is never below the largest singular value and at most S^(1/8) times as
        large, S the shorter side; else by the Frobenius norm, up to S^(1/2) times as large.
    """

    runs: tuple[Run, ...]
    tight: bool

    @property
    def polynomials(self) -> tuple[Polynomial, ...]:
        """All iterations in order."""
        return tuple(polynomial for run in self.runs for polynomial in run)

    def multiplications(self, shape: tuple[int, ...]) -> int:
        """Of all iterations on one matrix, in the form that takes fewer."""
        side, long = sorted(shape)
        return sum(2 * side**2 * long + (1 if len(run) == 1 else 5) * side**3 for run in self.runs_for(side, long))

    def runs_for(self, side: int, long: int) -> tuple[Run, ...]:
        """The runs of a matrix: two iterations are 2 S^2 L + 5 S^3 as a pair and 4 S^2 L + 2 S^3 each alone."""
        return self.runs if long >= 2 * side else tuple((polynomial,) for polynomial in self.polynomials)


_FIXED: Polynomial = (3.4445, -4.7750, 2.0315)

SCHEMES = {
    # Moonlight (arXiv 2502.16982, section 2.1) and torch.optim.Muon: five equal iterations.
    "moonlight": Scheme(((_FIXED,),) * 5, tight=False),
    # Polar Express (arXiv 2505.16932, with its cushion): each polynomial is the best approximation of 1, in the maximum
    # norm, on the range that the one before it leaves of singular values from 1/290 to 1. Ranges begin at 0.024 of
    # their end at least, or rounding would turn over what the polynomial makes small; they end 1, 4, 2 and 1% higher
    # than in exact arithmetic, because a polynomial explodes beyond its range.
    "polar_express": Scheme(
        (
            ((8.1245, -22.6797, 16.3016),),
            ((3.8398, -2.5997, 0.4532),),
            ((3.4175, -2.4668, 0.4769), (2.4504, -1.7737, 0.4176)),
        ),
        tight=True,
    ),
}
"""Values of `optimizer.newton_schulz`."""
