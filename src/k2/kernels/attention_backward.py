"""The two kernels of the attention's backward pass; `attention.py` explains the problem and calls them.

Both compute the probabilities again from the logits' saved log-sum. One gives the gradient of the queries, tile by
tile over keys, the other those of keys and values, tile by tile over queries: no atomic addition, so the same bits
every time. The shared rotary key gets one gradient per head; the caller adds them up.

Letters in shapes: T tokens, H heads, C content width, R rotary width, V value width.
"""

import triton.language as tl

from k2.kernels.runtime import Block, Float, Int, Ptr, Tile, dot, jit, rounded

QUERY_TILES = {
    80: Tile({"BM": 64, "BN": 32}, num_warps=8, num_stages=2),
    90: Tile({"BM": 128, "BN": 64}, num_warps=8, num_stages=2),
    100: Tile({"BM": 128, "BN": 64}, num_warps=8, num_stages=2),
}
KEY_TILES = {
    80: Tile({"BM": 64, "BN": 32}, num_warps=4, num_stages=1),
    90: Tile({"BM": 64, "BN": 64}, num_warps=8, num_stages=2),
    100: Tile({"BM": 64, "BN": 64}, num_warps=8, num_stages=2),
}


@jit
def load_rows(base: Ptr, rows: Block, open: Block, stride: Int, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> Block:
    """Rows of WIDTH values, filled up with zeros to BLOCK."""
    column = tl.arange(0, BLOCK)
    mask = open[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@jit
def store_rows(
    base: Ptr, value: Block, rows: Block, open: Block, stride: Int, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """The inverse of `load_rows`, rounding to the type of `base`."""
    column = tl.arange(0, BLOCK)
    mask = open[:, None] & (column < WIDTH)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, rounded(value, base.dtype.element_ty), mask=mask)


@jit
def query_kernel(
    qc_THC: Ptr, qr_THR: Ptr, kc_THC: Ptr, kr_TR: Ptr, v_THV: Ptr, out_THV: Ptr, grad_THV: Ptr, log_sum_HT: Ptr,
    delta_HT: Ptr, dqc_THC: Ptr, dqr_THR: Ptr, start_T: Ptr,
    stride_qc: Int, stride_qr: Int, stride_kc: Int, stride_v: Int, T: Int, scale: Float, factor: Float,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one tile of queries, and delta = sum(grad * out), which the other kernel needs too."""
    head = tl.program_id(1)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    rows = first + tl.arange(0, BM)
    open = rows < T
    starts = tl.load(start_T + rows, mask=open, other=0)
    qc = load_rows(qc_THC + head * stride_qc, rows, open, H * stride_qc, C, BC)
    qr = load_rows(qr_THR + head * stride_qr, rows, open, H * stride_qr, R, BR)
    grad = load_rows(grad_THV + head * V, rows, open, H * V, V, BV)
    out = load_rows(out_THV + head * V, rows, open, H * V, V, BV)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_HT + head * T + rows, delta, mask=open)
    log_sum = tl.load(log_sum_HT + head * T + rows, mask=open, other=0.0)
    dqc = tl.zeros((BM, BC), tl.float32)
    dqr = tl.zeros((BM, BR), tl.float32)
    for key in range(tl.load(start_T + first), min(first + BM, T), BN):
        keys = key + tl.arange(0, BN)
        kc = load_rows(kc_THC + head * stride_kc, keys, keys < T, H * stride_kc, C, BC)
        kr = load_rows(kr_TR, keys, keys < T, R, R, BR)
        v = load_rows(v_THV + head * stride_v, keys, keys < T, H * stride_v, V, BV)
        logits = dot(qr, tl.trans(kr), dot(qc, tl.trans(kc), tl.zeros((BM, BN), tl.float32)))
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= starts[:, None])
        p = tl.where(seen, tl.exp2(logits * factor - log_sum[:, None]), 0.0)
        dp = dot(grad, tl.trans(v), tl.zeros((BM, BN), tl.float32))
        ds = rounded(p * (dp - delta[:, None]) * scale, kc_THC.dtype.element_ty)
        dqc = dot(ds, kc, dqc)
        dqr = dot(ds, kr, dqr)
    store_rows(dqc_THC + head * C, dqc, rows, open, H * C, C, BC)
    store_rows(dqr_THR + head * R, dqr, rows, open, H * R, R, BR)


@jit
def key_kernel(
    qc_THC: Ptr, qr_THR: Ptr, kc_THC: Ptr, kr_TR: Ptr, v_THV: Ptr, grad_THV: Ptr, log_sum_HT: Ptr,
    delta_HT: Ptr, dkc_THC: Ptr, dkr_THR: Ptr, dv_THV: Ptr, start_T: Ptr, end_T: Ptr,
    stride_qc: Int, stride_qr: Int, stride_kc: Int, stride_v: Int, T: Int, scale: Float, factor: Float,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one tile of keys and values; logits lie transposed, keys by queries."""
    head = tl.program_id(1)
    first = tl.program_id(0) * BN
    keys = first + tl.arange(0, BN)
    open = keys < T
    kc = load_rows(kc_THC + head * stride_kc, keys, open, H * stride_kc, C, BC)
    kr = load_rows(kr_TR, keys, open, R, R, BR)
    v = load_rows(v_THV + head * stride_v, keys, open, H * stride_v, V, BV)
    dkc = tl.zeros((BN, BC), tl.float32)
    dkr = tl.zeros((BN, BR), tl.float32)
    dv = tl.zeros((BN, BV), tl.float32)
    for query in range(first, tl.load(end_T + min(first + BN, T) - 1), BM):
        rows = query + tl.arange(0, BM)
        inside = rows < T
        starts = tl.load(start_T + rows, mask=inside, other=T)
        log_sum = tl.load(log_sum_HT + head * T + rows, mask=inside, other=0.0)
        delta = tl.load(delta_HT + head * T + rows, mask=inside, other=0.0)
        qc = load_rows(qc_THC + head * stride_qc, rows, inside, H * stride_qc, C, BC)
        qr = load_rows(qr_THR + head * stride_qr, rows, inside, H * stride_qr, R, BR)
        grad = load_rows(grad_THV + head * V, rows, inside, H * V, V, BV)
        logits = dot(kr, tl.trans(qr), dot(kc, tl.trans(qc), tl.zeros((BN, BM), tl.float32)))
        seen = (keys[:, None] <= rows[None, :]) & (keys[:, None] >= starts[None, :])
        p = tl.where(seen, tl.exp2(logits * factor - log_sum[None, :]), 0.0)
        dv = dot(rounded(p, grad_THV.dtype.element_ty), grad, dv)
        dp = dot(v, tl.trans(grad), tl.zeros((BN, BM), tl.float32))
        ds = rounded(p * (dp - delta[None, :]) * scale, qc_THC.dtype.element_ty)
        dkc = dot(ds, qc, dkc)
        dkr = dot(ds, qr, dkr)
    store_rows(dkc_THC + head * C, dkc, keys, open, H * C, C, BC)
    store_rows(dkr_THR + head * R, dkr, keys, open, H * R, R, BR)
    store_rows(dv_THV + head * V, dv, keys, open, H * V, V, BV)
