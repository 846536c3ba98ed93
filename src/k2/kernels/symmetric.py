"""Products that are symmetric, X X^T, at half of their cost, and the Newton-Schulz iteration made of them.

Only tiles on and below the diagonal are computed; each is written twice. In X <- aX + (bG + cG^2) X with G = X X^T
both G and G^2 = G G^T are such products (Moonlight, arXiv 2502.16982, section 2.1).

Letters in shapes: N matrices, R rows, C columns.
"""

import torch
import triton.language as tl
from torch import Tensor

from k2.kernels.launch import Launch, Work
from k2.kernels.runtime import Float, Int, Ptr, Tile, blocks, dot, jit, rounded, runs_here, tile_for
from k2.optim.schemes import Scheme

EPS = 1e-7
"""Smallest Frobenius norm that a matrix is divided by."""

TILES = {
    80: Tile({"BM": 128, "BK": 32}, num_warps=8, num_stages=4),
    90: Tile({"BM": 128, "BK": 64}, num_warps=8, num_stages=4),
    100: Tile({"BM": 128, "BK": 64}, num_warps=8, num_stages=4),
}


@jit
def symmetric_kernel(
    x_NRC: Ptr, add_NRR: Ptr, y_NRR: Ptr, R: Int, C: Int, alpha: Float, beta: Float,
    BM: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of alpha X X^T + beta A below the diagonal, and its mirror image above."""
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    if pid_n > pid_m:
        return
    matrix = tl.program_id(2).to(tl.int64)
    rows, columns, inner = pid_m * BM + tl.arange(0, BM), pid_n * BM + tl.arange(0, BM), tl.arange(0, BK)
    row_open, column_open = (rows < R)[:, None], (columns < R)[None, :]
    left = x_NRC + matrix * R * C + rows.to(tl.int64)[:, None] * C + inner[None, :]
    right = x_NRC + matrix * R * C + columns.to(tl.int64)[None, :] * C + inner[:, None]
    total = tl.zeros((BM, BM), tl.float32)
    for k in range(0, C, BK):
        if EVEN:
            a = tl.load(left, mask=row_open, other=0.0)
            b = tl.load(right, mask=column_open, other=0.0)
        else:
            a = tl.load(left, mask=row_open & (inner[None, :] < C - k), other=0.0)
            b = tl.load(right, mask=column_open & (inner[:, None] < C - k), other=0.0)
        total = dot(a, b, total)
        left += BK
        right += BK
    base = matrix * R * R
    below = base + rows.to(tl.int64)[:, None] * R + columns[None, :]
    total = total * alpha
    if ADD:
        total += beta * tl.load(add_NRR + below, mask=row_open & column_open, other=0.0).to(tl.float32)
    dtype = y_NRR.dtype.element_ty
    tl.store(y_NRR + below, rounded(total, dtype), mask=row_open & column_open)
    if pid_n < pid_m:
        above = base + columns.to(tl.int64)[:, None] * R + rows[None, :]
        mirrored = rounded(tl.trans(total), dtype)
        tl.store(y_NRR + above, mirrored, mask=(columns < R)[:, None] & (rows < R)[None, :])


def reference(x_NRC: Tensor, add_NRR: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """The same in torch."""
    product = x_NRC @ x_NRC.mT * alpha
    return product if add_NRR is None else product + beta * add_NRR


def symmetric_product(x_NRC: Tensor, add_NRR: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha X X^T + beta A for every matrix, [N, R, R], exactly symmetric; A must be symmetric. Contiguous input."""
    if not runs_here(x_NRC, "symmetric_product"):
        return reference(x_NRC, add_NRR, alpha, beta)
    N, R, C = x_NRC.shape
    tile = tile_for(TILES, x_NRC)
    y_NRR = x_NRC.new_empty(N, R, R)
    tiles = blocks(R, tile.sizes["BM"])
    symmetric_kernel[(tiles, tiles, N)](
        x_NRC, add_NRR, y_NRR, R, C, alpha, beta, ADD=add_NRR is not None, EVEN=C % tile.sizes["BK"] == 0,
        **tile.options(),
    )  # fmt: skip
    return y_NRR


def newton_schulz(matrices_NRC: Tensor, scheme: Scheme) -> Tensor:
    """Replace the singular values of every matrix by values near one.

    A step costs R^2 C + R^3 multiplications for the two symmetric products and 2 R^2 C for the third, where ordinary
    products cost 4 R^2 C + 2 R^3. Computes in the matrices' own type; tall ones are transposed and come back so.

    Args:
        matrices_NRC: a batch; zero matrices stay zero.
        scheme: one of `k2.optim.schemes.SCHEMES`.
    """
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = (matrices_NRC.mT if tall else matrices_NRC).contiguous()
    x = x / _norm(x).to(x.dtype)
    if scheme.tight:
        fourth = symmetric_product(symmetric_product(x))  # its norm is the fourth power of X's Schatten 8-norm
        x = x / _norm(fourth).pow(0.25).to(x.dtype)
    for a, b, c in scheme.polynomials:
        gram_NRR = symmetric_product(x)
        x = torch.baddbmm(x, symmetric_product(gram_NRR, gram_NRR, c, b), x, beta=a)
    return x.mT if tall else x


def _norm(x_NRC: Tensor) -> Tensor:
    wide = torch.promote_types(x_NRC.dtype, torch.float32)
    norm_N11: Tensor = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=wide)
    return norm_N11.clamp_(min=EPS)


def _launches() -> tuple[Launch, ...]:
    """The gate halves of 24 experts: 2,048 x 7,168."""
    N, R, C, tile = 24, 2048, 7168, TILES[90]
    block, block_k, tiles = tile.sizes["BM"], tile.sizes["BK"], blocks(R, tile.sizes["BM"])
    arguments: dict[str, str | int] = dict.fromkeys(("x_NRC", "add_NRR", "y_NRR"), "*bf16")
    arguments |= {"R": R, "alpha": "fp32", "beta": "fp32"}
    launches = []
    for name, width, add in (("gram", C, False), ("square", R, True)):
        work = Work(
            flops=float(N) * tiles * (tiles + 1) * block * block * width,
            bytes=2.0 * N * (R * width + R * R * (1.5 if add else 1)),
            tile_flops=2.0 * block * block * block_k,
            tile_bytes=4.0 * block * block_k,
            programs=N * tiles * (tiles + 1) // 2,
        )
        launches.append(
            Launch(
                f"symmetric.{name}", f"{N} matrices {R} x {width}", symmetric_kernel, TILES, arguments | {"C": width},
                work, {"ADD": add, "EVEN": True}, matrix=True,
            )
        )  # fmt: skip
    return tuple(launches)


LAUNCHES = _launches()
