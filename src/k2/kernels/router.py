"""Router: sigmoid, bias, top-k, normalisation and the permutation of (token, choice) pairs into experts' rows.

One kernel does all that one token needs and ranks the pairs of its block of tokens; from the blocks' counts the second
kernel knows every pair's row. Rows of an expert are in token order whatever the GPU does first. DeepSeek-V3 (arXiv
2412.19437, section 2.1.2) with one group, as Kimi K2 has it.

Letters in shapes: T tokens, E experts, S choices per token, B blocks of tokens, N = T S rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2.kernels.launch import Launch, Work
from k2.kernels.runtime import Float, Int, Ptr, Tile, blocks, jit, runs_here, tile_for

TILES = {arch: Tile({"BT": 4}, num_warps=8) for arch in (80, 90, 100)}
ROWS_TILES = {arch: Tile({"BN": 256}, num_warps=4) for arch in (80, 90, 100)}


class Route(NamedTuple):
    """Where tokens go.

    experts_TS, weights_TS: chosen experts (int32), best first, and what their outputs are multiplied by (float32).
    slots_TS: row of each pair. source_N: pair t * S + s of each row. offsets_E: first rows of the experts and N.
    """

    experts_TS: Tensor
    weights_TS: Tensor
    slots_TS: Tensor
    source_N: Tensor
    offsets_E: Tensor


@jit
def choose_kernel(
    logits_TE: Ptr, bias_E: Ptr, experts_TS: Ptr, weights_TS: Ptr, rank_TS: Ptr, counts_BE: Ptr,
    T: Int, E: Int, scaling: Float,
    S: tl.constexpr, BT: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
) -> None:  # fmt: skip
    """Choices and weights of BT tokens, every pair's rank among its expert's pairs here, and the experts' counts."""
    tokens, expert, choice = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    open = (tokens < T)[:, None] & (expert < E)[None, :]
    at = tokens.to(tl.int64)[:, None] * E + expert[None, :]
    scores = tl.sigmoid(tl.load(logits_TE + at, mask=open, other=0.0))
    merit = scores + tl.load(bias_E + expert, mask=expert < E, other=0.0)[None, :]
    merit = tl.where(open & (merit == merit), merit, float("-inf"))  # NaN is chosen last, and shows in its weight
    free = (expert < E)[None, :] & (tokens >= 0)[:, None]
    experts = tl.zeros((BT, CHOICES), tl.int32)
    chosen = tl.zeros((BT, CHOICES), tl.float32)
    for s in tl.static_range(S):
        best = tl.max(tl.where(free, merit, float("-inf")), 1)
        first = tl.min(tl.where(free & (merit >= best[:, None]), expert[None, :], EXPERTS), 1)
        mine = expert[None, :] == first[:, None]
        free = free & (expert[None, :] != first[:, None])
        here = (choice == s)[None, :]
        experts = tl.where(here, first[:, None], experts)
        chosen = tl.where(here, tl.sum(tl.where(mine, scores, 0.0), 1)[:, None], chosen)
    weights = chosen / (tl.sum(chosen, 1) + 1e-20)[:, None] * scaling
    taken = tl.where(open & (free == 0), 1, 0)
    before = tl.cumsum(taken, 0) - taken
    ranks = tl.zeros((BT, CHOICES), tl.int32)
    for s in tl.static_range(S):
        here = (choice == s)[None, :]
        first = tl.sum(tl.where(here, experts, 0), 1)
        rank = tl.sum(tl.where(expert[None, :] == first[:, None], before, 0), 1)
        ranks = tl.where(here, rank[:, None], ranks)
    pairs = tokens.to(tl.int64)[:, None] * S + choice[None, :]
    pair_open = (tokens < T)[:, None] & (choice < S)[None, :]
    tl.store(experts_TS + pairs, experts, mask=pair_open)
    tl.store(weights_TS + pairs, weights, mask=pair_open)
    tl.store(rank_TS + pairs, ranks, mask=pair_open)
    tl.store(counts_BE + tl.program_id(0).to(tl.int64) * E + expert, tl.sum(taken, 0), mask=expert < E)


@jit
def rows_kernel(
    experts_TS: Ptr, rank_TS: Ptr, first_BE: Ptr, slots_TS: Ptr, source_N: Ptr, N: Int, E: Int,
    S: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Row of each pair: the first of its block's rows of that expert, plus its rank; and the inverse."""
    pair = tl.program_id(0) * BN + tl.arange(0, BN)
    open = pair < N
    expert = tl.load(experts_TS + pair, mask=open, other=0)
    block = (pair // (S * BT)).to(tl.int64)
    slot = tl.load(first_BE + block * E + expert, mask=open, other=0)
    slot += tl.load(rank_TS + pair, mask=open, other=0)
    tl.store(slots_TS + pair, slot, mask=open)
    tl.store(source_N + slot, pair, mask=open)


@jit
def backward_kernel(
    grad_TS: Ptr, logits_TE: Ptr, experts_TS: Ptr, dlogits_TE: Ptr, T: Int, E: Int, scaling: Float,
    S: tl.constexpr, BT: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
) -> None:  # fmt: skip
    """Through weight = scaling s / sum(s) and s = sigmoid(logit); experts that were not chosen get zero."""
    tokens, expert, choice = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    rows = tokens.to(tl.int64)[:, None]
    pair_open = (tokens < T)[:, None] & (choice < S)[None, :]
    experts = tl.load(experts_TS + rows * S + choice[None, :], mask=pair_open, other=-1)
    grad = tl.load(grad_TS + rows * S + choice[None, :], mask=pair_open, other=0.0)
    score = tl.where(pair_open, tl.sigmoid(tl.load(logits_TE + rows * E + experts, mask=pair_open, other=0.0)), 0.0)
    total = tl.sum(score, 1) + 1e-20
    mean = tl.sum(grad * score, 1) / total
    dlogit = scaling * (grad - mean[:, None]) / total[:, None] * score * (1 - score)
    dlogits = tl.zeros((BT, EXPERTS), tl.float32)
    for s in tl.static_range(S):
        here = (choice == s)[None, :]
        mine = expert[None, :] == tl.sum(tl.where(here, experts, 0), 1)[:, None]
        dlogits = tl.where(mine, tl.sum(tl.where(here, dlogit, 0.0), 1)[:, None], dlogits)
    open = (tokens < T)[:, None] & (expert < E)[None, :]
    tl.store(dlogits_TE + rows * E + expert[None, :], dlogits, mask=open)


def _sizes(experts: int, choices: int) -> dict[str, int]:
    return {"S": choices, "EXPERTS": triton.next_power_of_2(experts), "CHOICES": triton.next_power_of_2(choices)}


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, bias_E: Tensor, choices: int, scaling: float) -> tuple[Tensor, ...]:
        T, E = logits_TE.shape
        tile, rows_tile = tile_for(TILES, logits_TE), tile_for(ROWS_TILES, logits_TE)
        BT, N = tile.sizes["BT"], T * choices
        experts_TS, rank_TS, slots_TS = (logits_TE.new_empty(T, choices, dtype=torch.int32) for _ in range(3))
        weights_TS = logits_TE.new_empty(T, choices)
        counts_BE = logits_TE.new_empty(blocks(T, BT), E, dtype=torch.int32)
        source_N = logits_TE.new_empty(N, dtype=torch.int32)
        if T:
            choose_kernel[(blocks(T, BT),)](
                logits_TE, bias_E, experts_TS, weights_TS, rank_TS, counts_BE, T, E, scaling,
                **_sizes(E, choices), **tile.options(),
            )  # fmt: skip
        offsets_E = torch.zeros(E + 1, dtype=torch.int32, device=logits_TE.device)
        torch.cumsum(counts_BE.sum(0), 0, dtype=torch.int32, out=offsets_E[1:])
        first_BE = counts_BE.cumsum(0, dtype=torch.int32) - counts_BE + offsets_E[:-1]
        if T:
            rows_kernel[(blocks(N, rows_tile.sizes["BN"]),)](
                experts_TS, rank_TS, first_BE, slots_TS, source_N, N, E, choices, BT, **rows_tile.options()
            )
        ctx.save_for_backward(logits_TE, experts_TS)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(experts_TS, slots_TS, source_N, offsets_E)
        return experts_TS, weights_TS, slots_TS, source_N, offsets_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_TS: Tensor, *rest: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TE, experts_TS = ctx.saved_tensors
        (T, E), tile = logits_TE.shape, tile_for(TILES, logits_TE)
        dlogits_TE = torch.empty_like(logits_TE)
        if T:
            backward_kernel[(blocks(T, tile.sizes["BT"]),)](
                grad_TS.contiguous(), logits_TE, experts_TS, dlogits_TE, T, E, ctx.scaling,
                **_sizes(E, experts_TS.shape[1]), **tile.options(),
            )  # fmt: skip
        return dlogits_TE, None, None, None


def reference(logits_TE: Tensor, bias_E: Tensor, choices: int, scaling: float) -> Route:
    """The same in torch."""
    scores_TE = logits_TE.sigmoid()
    order = (scores_TE.detach() + bias_E).sort(dim=-1, descending=True, stable=True).indices
    experts_TS = order[:, :choices]
    weights_TS = scores_TE.gather(1, experts_TS)
    weights_TS = weights_TS / (weights_TS.sum(-1, keepdim=True) + 1e-20) * scaling
    source_N = experts_TS.flatten().argsort(stable=True)
    slots = torch.empty_like(source_N)
    slots[source_N] = torch.arange(len(source_N), device=source_N.device)
    counts_E = torch.bincount(experts_TS.flatten(), minlength=logits_TE.shape[1])
    offsets_E = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    integers = (x.to(torch.int32) for x in (experts_TS, slots.view_as(experts_TS), source_N, offsets_E))
    experts_TS, slots_TS, source_N, offsets_E = integers
    return Route(experts_TS, weights_TS, slots_TS, source_N, offsets_E)


def route(logits_TE: Tensor, bias_E: Tensor, choices: int, scaling: float) -> Route:
    """Choose `choices` experts per token by sigmoid(logit) + bias, the lower one of equals; weights differentiable.

    Args:
        logits_TE: contiguous float32.
        bias_E: float32; takes part in the choice only.
        choices: at most E.
        scaling: sum of a token's weights, which are proportional to its unbiased scores.
    """
    if not runs_here(logits_TE, "route"):
        return reference(logits_TE, bias_E, choices, scaling)
    return Route(*_Router.apply(logits_TE, bias_E, choices, scaling))  # type: ignore[no-untyped-call]


def _launches() -> tuple[Launch, ...]:
    T, E, S, tile, rows_tile = 4096, 384, 8, TILES[90], ROWS_TILES[90]
    BT, N = tile.sizes["BT"], T * S
    arguments: dict[str, str | int] = dict.fromkeys(("logits_TE", "bias_E", "weights_TS"), "*fp32")
    arguments |= dict.fromkeys(("grad_TS", "dlogits_TE"), "*fp32")
    integers = ("experts_TS", "rank_TS", "counts_BE", "first_BE", "slots_TS", "source_N")
    arguments |= dict.fromkeys(integers, "*i32") | {"T": T, "E": E, "N": N, "scaling": "fp32"}
    size, programs = f"{T} tokens, {E} experts, {S} choices", blocks(T, BT)
    choose = Work(
        T * E * (6.0 + 6 * S), 4.0 * (T * E + E + 3 * N + programs * E), BT * E * 54.0, BT * E * 4.0, programs
    )
    rows = Work(2.0 * N, 4.0 * (N * 4 + programs * E), 512.0, 4096.0, blocks(N, rows_tile.sizes["BN"]))
    back = Work(T * E * 2.0 * S, 4.0 * (T * E + 3 * N), BT * E * 16.0, BT * E * 4.0, programs)
    return (
        Launch("router.choose", size, choose_kernel, TILES, arguments, choose, _sizes(E, S)),
        Launch("router.rows", size, rows_kernel, ROWS_TILES, arguments, rows, {"S": S, "BT": BT}),
        Launch("router.backward", size, backward_kernel, TILES, arguments, back, _sizes(E, S)),
    )


LAUNCHES = _launches()
