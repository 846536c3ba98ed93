"""Linear layer and cross-entropy in one: the logits [T, V] never lie in memory (Kimi K2 has 163,840 columns).

Forward, one kernel multiplies hidden and weight and keeps of every tile only its rows' log-sum-exp and the target's
logit. Backward, another one computes the logits of a chunk of tokens again and writes their gradient, which two
ordinary products carry on to hidden and weight. Nothing is added atomically: the same bits every time.

Letters in shapes: T tokens, D hidden, V vocabulary, P vocabulary tiles.
"""

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.kernels.launch import Launch, gemm_work
from k2.kernels.runtime import (
    Block,
    Int,
    Ptr,
    Tile,
    blocks,
    dot,
    grouped_order,
    jit,
    rounded,
    runs_here,
    tile_for,
)

TILES = {
    80: Tile({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=4),
    90: Tile({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    100: Tile({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
}
CHUNK_VALUES = 2**28
"""Gradients of logits in memory at once: 512 MiB in bfloat16, 1,638 tokens of Kimi K2."""


@jit
def _logits(
    h_TD: Ptr, w_VD: Ptr, rows: Block, columns: Block, T: Int, V: Int, D: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
) -> Block:  # fmt: skip
    """hidden weight^T of one tile; -inf beyond the vocabulary."""
    inner = tl.arange(0, BK)
    h = h_TD + rows.to(tl.int64)[:, None] * D + inner[None, :]
    w = w_VD + columns.to(tl.int64)[None, :] * D + inner[:, None]
    row_open, column_open = (rows < T)[:, None], (columns < V)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        if EVEN:
            a = tl.load(h, mask=row_open, other=0.0)
            b = tl.load(w, mask=column_open, other=0.0)
        else:
            a = tl.load(h, mask=row_open & (inner[None, :] < D - k), other=0.0)
            b = tl.load(w, mask=column_open & (inner[:, None] < D - k), other=0.0)
        total = dot(a, b, total)
        h += BK
        w += BK
    return tl.where(column_open, total, float("-inf"))


@jit
def forward_kernel(
    h_TD: Ptr, w_VD: Ptr, target_T: Ptr, log_sum_PT: Ptr, chosen_T: Ptr, T: Int, V: Int, D: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """Log-sum-exp of the rows of one tile; the tile that holds a row's target stores its logit."""
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(V, BN), GROUP)
    rows, columns = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    logits = _logits(h_TD, w_VD, rows, columns, T, V, D, BM, BN, BK, EVEN)
    top = tl.max(logits, 1)
    log_sum = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))
    tl.store(log_sum_PT + pid_n.to(tl.int64) * T + rows, log_sum, mask=rows < T)
    target = tl.load(target_T + rows, mask=rows < T, other=-1)
    chosen = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
    tl.store(chosen_T + rows, chosen, mask=(target >= pid_n * BN) & (target < pid_n * BN + BN))


@jit
def gradient_kernel(
    h_TD: Ptr, w_VD: Ptr, target_T: Ptr, log_sum_T: Ptr, grad_T: Ptr, dlogits_TV: Ptr, T: Int, V: Int, D: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """(softmax - one-hot) * grad of one tile."""
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(V, BN), GROUP)
    rows, columns = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    logits = _logits(h_TD, w_VD, rows, columns, T, V, D, BM, BN, BK, EVEN)
    open = rows < T
    log_sum = tl.load(log_sum_T + rows, mask=open, other=0.0)
    target = tl.load(target_T + rows, mask=open, other=-1)
    grad = tl.load(grad_T + rows, mask=open, other=0.0)
    p = tl.exp(logits - log_sum[:, None])
    dlogits = tl.where(columns[None, :] == target[:, None], p - 1.0, p) * grad[:, None]
    pointers = dlogits_TV + rows.to(tl.int64)[:, None] * V + columns[None, :]
    dtype = dlogits_TV.dtype.element_ty
    tl.store(pointers, rounded(dlogits, dtype), mask=open[:, None] & (columns < V)[None, :])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        (T, D), V = hidden_TD.shape, weight_VD.shape[0]
        tile = tile_for(TILES, hidden_TD)
        tiles_n = blocks(V, tile.sizes["BN"])
        log_sum_PT = hidden_TD.new_empty(tiles_n, T, dtype=torch.float32)
        chosen_T = hidden_TD.new_empty(T, dtype=torch.float32)
        if T:
            forward_kernel[(blocks(T, tile.sizes["BM"]) * tiles_n,)](
                hidden_TD, weight_VD, target_T, log_sum_PT, chosen_T, T, V, D,
                EVEN=D % tile.sizes["BK"] == 0, **tile.options(),
            )  # fmt: skip
        log_sum_T = log_sum_PT.logsumexp(0)
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, log_sum_T)
        return log_sum_T - chosen_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_TD, weight_VD, target_T, log_sum_T = ctx.saved_tensors
        size = max(1, CHUNK_VALUES // weight_VD.shape[0])
        grad_hidden = torch.empty_like(hidden_TD)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        pieces = (x.split(size) for x in (hidden_TD, target_T, log_sum_T, grad_T.contiguous(), grad_hidden))
        for hidden, target, log_sum, grad, out in zip(*pieces, strict=True):
            dlogits = _gradient(hidden, weight_VD, target, log_sum, grad)
            torch.mm(dlogits, weight_VD, out=out)
            grad_weight += dlogits.T @ hidden
        return grad_hidden, grad_weight.to(weight_VD.dtype), None


def _gradient(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, log_sum_T: Tensor, grad_T: Tensor) -> Tensor:
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    tile = tile_for(TILES, hidden_TD)
    dlogits_TV = hidden_TD.new_empty(T, V)
    if T:
        gradient_kernel[(blocks(T, tile.sizes["BM"]) * blocks(V, tile.sizes["BN"]),)](
            hidden_TD, weight_VD, target_T, log_sum_T, grad_T, dlogits_TV, T, V, D,
            EVEN=D % tile.sizes["BK"] == 0, **tile.options(),
        )  # fmt: skip
    return dlogits_TV


def reference(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """The same in torch, all logits in memory."""
    logits_TV = hidden_TD @ weight_VD.T
    wide = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(wide, target_T.long(), reduction="none")


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """-log softmax(hidden weight^T) at each token's target in nats, [T] in float32.

    `hidden_TD` and `weight_VD` are contiguous and of one type; targets are integers from 0 to V - 1.
    """
    if not runs_here(hidden_TD, "linear_cross_entropy"):
        return reference(hidden_TD, weight_VD, target_T)
    result: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, target_T)  # type: ignore[no-untyped-call]
    return result


def _launches() -> tuple[Launch, ...]:
    T, V, D, tile = 4096, 163840, 7168, TILES[90]
    arguments: dict[str, str | int] = {"h_TD": "*bf16", "w_VD": "*bf16", "dlogits_TV": "*bf16", "target_T": "*i64"}
    arguments |= dict.fromkeys(("log_sum_PT", "chosen_T", "log_sum_T", "grad_T"), "*fp32")
    work = gemm_work(T, V, D, tile)
    forward = replace(work, bytes=2.0 * (T + V) * D + 4 * T * blocks(V, tile.sizes["BN"]))
    chunk = min(T, CHUNK_VALUES // V)
    shape: dict[str, str | int] = {"T": T, "V": V, "D": D}
    size = f"{T} tokens, {D} wide, vocabulary {V}"
    return (
        Launch(
            "linear_cross_entropy.forward", size, forward_kernel, TILES, arguments | shape, forward, {"EVEN": True},
            matrix=True,
        ),
        Launch(
            "linear_cross_entropy.grad_logits", f"{chunk} tokens of these", gradient_kernel, TILES,
            arguments | shape | {"T": chunk}, gemm_work(chunk, V, D, tile), {"EVEN": True}, matrix=True,
        ),
    )  # fmt: skip


LAUNCHES = _launches()
