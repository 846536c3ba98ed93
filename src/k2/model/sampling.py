"""Choosing the next token: temperature, top-k, top-p, and random numbers that belong to the sample.

Letters in shapes: B batch rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2.errors import UserError
from k2.kernels.cpu.decode import draw
from k2.model.backend import chooses_in_c

BLOCK = 64  # tokens whose probabilities are added before the draw
BLOCKWISE = 2**16  # from so many probabilities on, the draw of a block first is faster
BELOW_ONE = 1.0 - 2.0**-52  # rounding must not carry a draw past the last weight


@dataclass(frozen=True)
class SamplingConfig:
    """How one request is sampled.

    max_tokens: most tokens to generate, the stop token included.
    temperature: 0 takes the most likely token.
    top_p: keep the smallest set of tokens that reaches this probability; 1 keeps all.
    top_k: keep this many most likely tokens; 0 keeps all.
    seed: with the prompt and the sample's number, names the random stream.
    stop_ids: tokens that end the sample, besides the engine's.
    stop_sequences: token sequences that end the sample.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.max_tokens < 1:
            raise UserError(f"sampling.max_tokens is {self.max_tokens}, allowed are 1 and more")
        if not self.temperature >= 0:
            raise UserError(f"sampling.temperature is {self.temperature}, allowed are 0 and more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p is {self.top_p}, allowed is 0 < top_p <= 1")
        if self.top_k < 0:
            raise UserError(f"sampling.top_k is {self.top_k}, allowed are 0 (off) and more")


def stream_key(seed: int, prompt: Sequence[int], sample: int) -> int:
    """64-bit name of a sample's random stream; it depends on nothing else in the batch."""
    content = f"{seed}/{sample}/".encode() + np.asarray(prompt, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def uniforms(keys: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1): number `steps[i]` of stream `keys[i]` (SplitMix64, Steele et al. 2014)."""
    state = keys + (steps + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    result: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


@dataclass(frozen=True)
class RowSampling:
    """Sampling parameters of the rows of a batch, as columns [B, 1], and which steps any row needs at all."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    greedy: Tensor
    tempered: bool
    restricted: bool
    any_greedy: bool
    all_greedy: bool

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], device: torch.device) -> "RowSampling":
        """Collect the parameters of one configuration per row."""

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        greedy = column([float(c.temperature == 0) for c in configs]).bool()
        return cls(
            temperature=column([c.temperature or 1.0 for c in configs]),
            top_p=column([c.top_p for c in configs]),
            top_k=column([c.top_k or 2**24 for c in configs]),
            greedy=greedy,
            restricted=any(c.temperature and (c.top_k or c.top_p < 1) for c in configs),
            tempered=any(c.temperature not in (0, 1) for c in configs),
            any_greedy=any(c.temperature == 0 for c in configs),
            all_greedy=all(c.temperature == 0 for c in configs),
        )


def choose(logits_BV: Tensor, rows: RowSampling, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Next token of each row, its log-probability as sampled, and its log-probability at temperature 1.

    A greedy row's choice is certain, so its first log-probability is 0. `logits_BV` is at least float32.
    """
    if chooses_in_c(logits_BV) and not rows.restricted:
        return draw(logits_BV, rows.temperature, rows.greedy, uniform_B.clamp(max=BELOW_ONE))
    if rows.all_greedy:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return best_B1[:, 0], torch.zeros_like(logits_BV[:, 0]), _log_softmax_at(logits_BV, best_B1)
    scaled_BV = logits_BV / rows.temperature if rows.tempered else logits_BV
    if rows.restricted:
        scaled_BV = _restrict(scaled_BV, rows)
    probability_BV = scaled_BV.softmax(-1)
    token_B1 = _draw(probability_BV, uniform_B[:, None].clamp(max=BELOW_ONE))
    if rows.any_greedy:
        token_B1 = torch.where(rows.greedy, logits_BV.argmax(-1, keepdim=True), token_B1)
    sampled_B = probability_BV.gather(1, token_B1)[:, 0].log()
    if not (rows.any_greedy or rows.tempered or rows.restricted):
        return token_B1[:, 0], sampled_B, sampled_B
    return token_B1[:, 0], sampled_B.masked_fill(rows.greedy[:, 0], 0.0), _log_softmax_at(logits_BV, token_B1)


def _draw(weights_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """The index [B, 1] at which the cumulated weights of each row pass `uniform` times their sum."""
    rows, count = weights_BV.shape
    if rows * count >= BLOCKWISE and count > BLOCK and count % BLOCK == 0:
        return _draw_blockwise(weights_BV.view(rows, -1, BLOCK), uniform_B1)
    cdf_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_BV, uniform_B1 * cdf_BV[:, -1:], right=True)


def _draw_blockwise(weights_BNW: Tensor, uniform_B1: Tensor) -> Tensor:
    """`_draw` of a block by its sum, then inside of the block: sums are parallel, a cumulated sum is serial."""
    sums_BN = weights_BNW.sum(-1, dtype=torch.float64)
    cdf_BN = sums_BN.cumsum(-1)
    target_B1 = uniform_B1 * cdf_BN[:, -1:]
    block_B1 = torch.searchsorted(cdf_BN, target_B1, right=True)
    sum_B1 = sums_BN.gather(1, block_B1)
    share_B1 = (target_B1 - cdf_BN.gather(1, block_B1) + sum_B1) / sum_B1
    inside_BW = weights_BNW[torch.arange(len(block_B1), device=block_B1.device), block_B1[:, 0]]
    return block_B1 * BLOCK + _draw(inside_BW, share_B1.clamp_(0, BELOW_ONE))


def _log_softmax_at(logits_BV: Tensor, token_B1: Tensor) -> Tensor:
    return (logits_BV.gather(1, token_B1) - logits_BV.logsumexp(-1, keepdim=True))[:, 0]


def _restrict(scaled_BV: Tensor, rows: RowSampling) -> Tensor:
    """Set logits outside top-k, then outside top-p of what is left, to -inf; the best token always stays."""
    ordered, order = scaled_BV.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.masked_fill(rank >= rows.top_k, -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= rows.top_p) & (rank > 0) & (rows.top_p < 1)
    return torch.empty_like(scaled_BV).scatter_(1, order, ordered.masked_fill(outside, -torch.inf))
