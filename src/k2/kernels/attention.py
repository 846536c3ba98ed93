"""Flash attention for multi-head latent attention, causal and ragged, with every head's largest logit as an output.

Documents lie one after the other in one row of tokens; a token sees itself and earlier tokens of its document. The
rotary key, which all heads share, stays one tensor: keys are never put together. The running maximum that the softmax
keeps anyway is what QK-Clip needs (Kimi K2, arXiv 2507.20534, section 2.1).

Letters in shapes: T tokens, H heads, C content width, R rotary width, V value width, M query tiles.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from k2.kernels.attention_backward import KEY_TILES, QUERY_TILES, key_kernel, load_rows, query_kernel, store_rows
from k2.kernels.launch import Launch, Work
from k2.kernels.runtime import Block, Float, Int, Ptr, Tile, blocks, dot, jit, rounded, runs_here, tile_for

LOG2_E = 1.4426950408889634

TILES = {
    80: Tile({"BM": 128, "BN": 32}, num_warps=8, num_stages=3),
    90: Tile({"BM": 128, "BN": 64}, num_warps=8, num_stages=3),
    100: Tile({"BM": 128, "BN": 64}, num_warps=8, num_stages=2),
}


@jit
def _attend(
    total: Block, top: Block, mass: Block, q_content: Block, q_rotary: Block, rows: Block, starts: Block,
    kc: Ptr, kr: Ptr, v: Ptr, stride_kc: Int, stride_v: Int, lo: Int, hi: Int, T: Int, factor: Float,
    MASKED: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
) -> tuple[Block, Block, Block]:  # fmt: skip
    """Add the keys lo..hi to the running output, maximum logit (not scaled) and softmax mass of every row."""
    for first in range(lo, hi, BN):
        keys = first + tl.arange(0, BN)
        k_content = load_rows(kc, keys, keys < T, stride_kc, C, BC)
        k_rotary = load_rows(kr, keys, keys < T, R, R, BR)
        logits = dot(q_content, tl.trans(k_content), tl.zeros((rows.shape[0], BN), tl.float32))
        logits = dot(q_rotary, tl.trans(k_rotary), logits)
        if MASKED:
            seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= starts[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # A row that has seen nothing yet has -inf here, and -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher * factor)
        p = tl.exp2(logits * factor - shift[:, None])
        shrink = tl.exp2(top * factor - shift)
        mass = mass * shrink + tl.sum(p, 1)
        values = load_rows(v, keys, keys < T, stride_v, V, BV)
        total = dot(rounded(p, v.dtype.element_ty), values, total * shrink[:, None])
        top = higher
    return total, top, mass


@jit
def forward_kernel(
    qc_THC: Ptr, qr_THR: Ptr, kc_THC: Ptr, kr_TR: Ptr, v_THV: Ptr, out_THV: Ptr, log_sum_HT: Ptr, max_MH: Ptr,
    start_T: Ptr, stride_qc: Int, stride_qr: Int, stride_kc: Int, stride_v: Int, T: Int, scale: Float, factor: Float,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of queries of one head, the longest ones first. Only keys that some row does not see are masked."""
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    first = tile * BM
    rows = first + tl.arange(0, BM)
    open = rows < T
    starts = tl.load(start_T + rows, mask=open, other=0)
    end = min(first + BM, T)
    lo = tl.load(start_T + first)
    common = lo + (tl.load(start_T + end - 1) - lo + BN - 1) // BN * BN
    diagonal = common + max(first - common, 0) // BN * BN
    qc = load_rows(qc_THC + head * stride_qc, rows, open, H * stride_qc, C, BC)
    qr = load_rows(qr_THR + head * stride_qr, rows, open, H * stride_qr, R, BR)
    kc, v = kc_THC + head * stride_kc, v_THV + head * stride_v
    total = tl.zeros((BM, BV), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    total, top, mass = _attend(
        total, top, mass, qc, qr, rows, starts, kc, kr_TR, v, H * stride_kc, H * stride_v, lo, common, T, factor,
        True, BN, C, R, V, BC, BR, BV,
    )  # fmt: skip
    total, top, mass = _attend(
        total, top, mass, qc, qr, rows, starts, kc, kr_TR, v, H * stride_kc, H * stride_v, common, diagonal, T, factor,
        False, BN, C, R, V, BC, BR, BV,
    )  # fmt: skip
    total, top, mass = _attend(
        total, top, mass, qc, qr, rows, starts, kc, kr_TR, v, H * stride_kc, H * stride_v, diagonal, end, T, factor,
        True, BN, C, R, V, BC, BR, BV,
    )  # fmt: skip
    store_rows(out_THV + head * V, total / mass[:, None], rows, open, H * V, V, BV)
    tl.store(log_sum_HT + head * T + rows, top * factor + tl.log2(mass), mask=open)
    tl.store(max_MH + tile * H + head, tl.max(tl.where(open, top, float("-inf")), 0) * scale)


@dataclass(frozen=True)
class Documents:
    """First token and end of each token's document, int32 [T]."""

    start_T: Tensor
    end_T: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> "Documents":
        """From document bounds [documents + 1], the first 0 and the last `tokens`; empty documents are allowed."""
        lengths = cu_seqlens.diff()
        start, end = (
            bounds.repeat_interleave(lengths, output_size=tokens).to(torch.int32)
            for bounds in (cu_seqlens[:-1], cu_seqlens[1:])
        )
        return cls(start, end)

    @classmethod
    def between(cls, numbers_KT: Tensor) -> "Documents":
        """A document begins where any of the K numbers of a token differs from the token before; without the host."""
        tokens = numbers_KT.shape[1]
        change_T = (numbers_KT[:, 1:] != numbers_KT[:, :-1]).any(0)
        first_T, last_T = F.pad(change_T, (1, 0), value=True), F.pad(change_T, (0, 1), value=True)
        token_T = torch.arange(tokens, dtype=torch.int32, device=numbers_KT.device)
        start_T = torch.where(first_T, token_T, 0).cummax(0).values
        end_T = torch.where(last_T, token_T + 1, tokens).flip(0).cummin(0).values.flip(0)
        return cls(start_T, end_T.contiguous())


def _rows(x_THW: Tensor) -> Tensor:
    """Strided as [T, H, any][..., :W] is, so that one stride describes it: a slice of a projection is not copied."""
    regular = x_THW.stride(2) == 1 and x_THW.stride(0) == x_THW.shape[1] * x_THW.stride(1)
    return x_THW if regular else x_THW.contiguous()


def _widths(qc: Tensor, qr: Tensor, v: Tensor) -> dict[str, int]:
    widths = {"H": qc.shape[1], "C": qc.shape[2], "R": qr.shape[2], "V": v.shape[2]}
    return widths | {f"B{name}": max(16, triton.next_power_of_2(widths[name])) for name in "CRV"}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qc: Tensor, qr: Tensor, kc: Tensor, kr_TR: Tensor, v: Tensor, documents: Documents, scale: float
    ) -> tuple[Tensor, Tensor]:
        qc, qr, kc, kr_TR, v = _rows(qc), _rows(qr), _rows(kc), kr_TR.contiguous(), _rows(v)
        T, H, _ = qc.shape
        tile = tile_for(TILES, qc)
        tiles = blocks(T, tile.sizes["BM"])
        out_THV = v.new_empty(v.shape)
        log_sum_HT = qc.new_empty(H, T, dtype=torch.float32)
        max_MH = qc.new_empty(tiles, H, dtype=torch.float32)
        forward_kernel[(tiles, H)](
            qc, qr, kc, kr_TR, v, out_THV, log_sum_HT, max_MH, documents.start_T,
            qc.stride(1), qr.stride(1), kc.stride(1), v.stride(1), T, scale, scale * LOG2_E,
            **_widths(qc, qr, v), **tile.options(),
        )  # fmt: skip
        max_H = max_MH.amax(0)
        ctx.mark_non_differentiable(max_H)
        ctx.save_for_backward(qc, qr, kc, kr_TR, v, out_THV, log_sum_HT)
        ctx.documents, ctx.scale = documents, scale
        return out_THV, max_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qc, qr, kc, kr, v, out, log_sum = ctx.saved_tensors
        grad = grad_THV.contiguous()
        T, H, R = qr.shape
        delta_HT = torch.empty_like(log_sum)
        dqc, dqr, dkc, dv = (x.new_empty(x.shape) for x in (qc, qr, kc, v))
        dkr_THR = qr.new_empty(T, H, R, dtype=torch.float32)
        sizes = (qc.stride(1), qr.stride(1), kc.stride(1), v.stride(1), T, ctx.scale, ctx.scale * LOG2_E)
        tile = tile_for(QUERY_TILES, qc)
        query_kernel[(blocks(T, tile.sizes["BM"]), H)](
            qc, qr, kc, kr, v, out, grad, log_sum, delta_HT, dqc, dqr, ctx.documents.start_T, *sizes,
            **_widths(qc, qr, v), **tile.options(),
        )  # fmt: skip
        tile = tile_for(KEY_TILES, qc)
        key_kernel[(blocks(T, tile.sizes["BN"]), H)](
            qc, qr, kc, kr, v, grad, log_sum, delta_HT, dkc, dkr_THR, dv, ctx.documents.start_T, ctx.documents.end_T,
            *sizes, **_widths(qc, qr, v), **tile.options(),
        )  # fmt: skip
        return dqc, dqr, dkc, dkr_THR.sum(1).to(kr.dtype), dv, None, None


def reference(
    qc_THC: Tensor, qr_THR: Tensor, kc_THC: Tensor, kr_TR: Tensor, v_THV: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in torch, all logits in memory."""
    logits_HTT = torch.einsum("thc,shc->hts", qc_THC, kc_THC) + torch.einsum("thr,sr->hts", qr_THR, kr_TR)
    logits_HTT = logits_HTT.to(torch.promote_types(logits_HTT.dtype, torch.float32)) * scale
    token = torch.arange(len(v_THV), device=v_THV.device)
    seen_TT = (token <= token[:, None]) & (token >= documents.start_T[:, None])
    logits_HTT = logits_HTT.masked_fill(~seen_TT, -torch.inf)
    return torch.einsum("hts,shv->thv", logits_HTT.softmax(-1).to(v_THV.dtype), v_THV), logits_HTT.detach().amax((1, 2))


def mla_attention(
    qc_THC: Tensor, qr_THR: Tensor, kc_THC: Tensor, kr_TR: Tensor, v_THV: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale (qc kc^T + qr kr^T)) v within documents, and the largest logit of every head.

    Args:
        qc_THC, kc_THC: content parts of queries and keys; slices of wider projections are read in place.
        qr_THR, kr_TR: rotary parts, already rotated; the key's is shared by the heads.
        v_THV: values.
        documents: where each token's document starts and ends.
        scale: of the logits, positive.

    Returns:
        Output [T, H, V], and [H] in float32: the maximum over all pairs that are seen, scale included.
    """
    if not runs_here(v_THV, "mla_attention"):
        return reference(qc_THC, qr_THR, kc_THC, kr_TR, v_THV, documents, scale)
    result: tuple[Tensor, Tensor] = _Attention.apply(  # type: ignore[no-untyped-call]
        qc_THC, qr_THR, kc_THC, kr_TR, v_THV, documents, scale
    )
    return result


def _work(flops_per_pair: float, widths_moved: int, tile: Tile, step: str, stay: str) -> Work:
    """`widths_moved`: values of 2 bytes that one token of one head moves in all; `step`: what a step loads."""
    T, H, both = 4096, 64, 192 + 128
    rows = tile.sizes[step]
    return Work(
        flops_per_pair * H * T * T / 2, 2.0 * T * H * widths_moved, flops_per_pair * rows * tile.sizes[stay],
        2.0 * both * rows, H * blocks(T, tile.sizes[stay]),
    )  # fmt: skip


def _launches() -> tuple[Launch, ...]:
    T, H, C, R, V = 4096, 64, 128, 64, 128
    read = ("qc_THC", "qr_THR", "kc_THC", "kr_TR", "v_THV", "out_THV", "grad_THV")
    arguments: dict[str, str | int] = dict.fromkeys((*read, "dqc_THC", "dqr_THR", "dkc_THC", "dv_THV"), "*bf16")
    arguments |= dict.fromkeys(("log_sum_HT", "delta_HT", "max_MH", "dkr_THR"), "*fp32")
    arguments |= {"start_T": "*i32", "end_T": "*i32", "T": T, "scale": "fp32", "factor": "fp32"}
    arguments |= {"stride_qc": C + R, "stride_qr": R, "stride_kc": C + V, "stride_v": C + V}
    constants = {"H": H, "C": C, "R": R, "V": V, "BC": C, "BR": R, "BV": V}
    size = f"{T} tokens, {H} heads, {C} + {R} and {V} wide"
    width, moved = C + R, 2 * (C + R) + 2 * V  # queries, content keys, shared keys, values and outputs
    return (
        Launch(
            "attention.forward", size, forward_kernel, TILES, arguments,
            _work(2.0 * (width + V), moved - R, TILES[90], "BN", "BM"), constants, matrix=True,
        ),
        Launch(
            "attention.grad_queries", size, query_kernel, QUERY_TILES, arguments,
            _work(2.0 * (2 * width + V), moved + width + V, QUERY_TILES[90], "BN", "BM"), constants, matrix=True,
        ),
        Launch(
            "attention.grad_keys", size, key_kernel, KEY_TILES, arguments,
            _work(2.0 * (2 * width + 2 * V), moved + C + 2 * R + V, KEY_TILES[90], "BM", "BN"), constants, matrix=True,
        ),
    )  # fmt: skip


LAUNCHES = _launches()
