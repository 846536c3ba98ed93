"""Batched orthogonalisation by Newton-Schulz, in the form that costs less for the shape.

Letters in shapes: N matrices, R short side, C long side.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of X <- aX + b(XX^T)X + c(XX^T)^2 X (Moonlight, arXiv 2502.16982, section 2.1)."""

RESTART = 3
"""Iterations of the Gram form between two evaluations of XX^T. In bfloat16 the form loses small singular values to
rounding and amplifies the noise: without a restart singular values of 58 came out of ill-conditioned input."""

CACHE_BYTES = 1 << 20
"""Matrices worked on at once on a CPU, so that all iterations run in its second-level cache."""

EPS = 1e-7


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Replace the singular values of every matrix by values near one (0.68 to 1.14 once they converged).

    Args:
        matrices: `[rows, columns]` or a batch `[N, rows, columns]`; zero matrices stay zero.
        steps: iterations; five are what Moonlight uses.
        dtype: type computed in and returned.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    batch_NRC = x.reshape(-1, *x.shape[-2:])
    chunks = torch.split(batch_NRC, _per_chunk(batch_NRC))
    out_NRC = torch.empty_like(batch_NRC, memory_format=torch.contiguous_format)
    for chunk, result in zip(chunks, torch.split(out_NRC, _per_chunk(batch_NRC)), strict=True):
        result.copy_(_iterate(chunk, steps))
    out = out_NRC.view(x.shape)
    return out.mT if tall else out


def _per_chunk(batch_NRC: Tensor) -> int:
    if batch_NRC.device.type != "cpu":
        return batch_NRC.shape[0]
    return max(1, CACHE_BYTES // (batch_NRC[0].numel() * batch_NRC.element_size()))


def _iterate(x_NRC: Tensor, steps: int) -> Tensor:
    wide = torch.promote_types(x_NRC.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x_NRC, dim=(-2, -1), keepdim=True, dtype=wide)
    scaled_NRC = torch.empty_like(x_NRC, memory_format=torch.contiguous_format)
    torch.div(x_NRC, norm.clamp_(min=EPS).to(x_NRC.dtype), out=scaled_NRC)
    # Multiplications: 5 (2 R^2 C + R^3) against 4 R^2 C + 14 R^3; measured, they break even near C = 2R.
    iterate = gram_steps if x_NRC.shape[-1] >= 2 * x_NRC.shape[-2] else direct_steps
    return iterate(scaled_NRC, steps)


def direct_steps(x_NRC: Tensor, steps: int) -> Tensor:
    """The iteration as published, on matrices of Frobenius norm one at most."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        update_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, update_NRR, x_NRC, beta=a)
    return x_NRC


def gram_steps(x_NRC: Tensor, steps: int) -> Tensor:
    """The same iteration on the small Gram matrix: G <- ZGZ and P <- ZP with Z = aI + bG + cG^2, then X <- PX."""
    while steps > 0:
        count = min(RESTART, steps)
        x_NRC = _gram_polynomial(x_NRC @ x_NRC.mT, count) @ x_NRC
        steps -= count
    return x_NRC


def _gram_polynomial(gram_NRR: Tensor, steps: int) -> Tensor:
    """The product of `steps` factors Z; every matrix here is a polynomial of one Gram matrix, so all commute."""
    product_NRR = z_NRR = _factor(gram_NRR)
    for _ in range(steps - 1):
        gram_NRR = z_NRR @ gram_NRR @ z_NRR
        z_NRR = _factor(gram_NRR)
        product_NRR = z_NRR @ product_NRR
    return product_NRR


def _factor(gram_NRR: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    z_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
    z_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
    return z_NRR
