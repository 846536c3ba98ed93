"""What a micro-batch takes on a rank: what layers and loss leave for the backward pass, and their fullest moments.

Tensors that share memory count once. What `recompute` names is not there between the passes, what `fp8_storage` names
is there as FP8, and of the rest all but the tables of routing can be offloaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from k2.planner.layers import layer_of
from k2.planner.liveness import Lifetimes, Moment, fullest
from k2.planner.operations import FLOAT32, INT64, Sizes

KEPT_LOGITS = 2**26
"""Logits that the loss keeps; of more it computes them again, so many at a time (`k2.model.loss`)."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one micro-batch.

    device: where it is computed.
    host: what offloading takes away.
    """

    device: float
    host: float = 0.0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.device + other.device, self.host + other.host)

    def __rmul__(self, count: int) -> "Kept":
        return Kept(count * self.device, count * self.host)


@dataclass(frozen=True)
class LayerMemory:
    """One layer: what it leaves, and its fullest moments, its input and all that is its own included.

    score_gradients: bytes that wait from the loss on, where there is a balance loss.
    """

    kept: Kept
    forward: Moment
    backward: Moment
    score_gradients: float


@lru_cache(maxsize=4096)
def layer_memory(sizes: Sizes, dense: bool, fresh: bool = False) -> LayerMemory:
    """A dense layer or one with experts; `fresh` as in `Lifetimes.backward`."""
    layer = layer_of(sizes, dense)
    life = Lifetimes(layer)
    moves, stays, tables = life.kept(), layer.denominators, layer.tables
    back = life.backward(fresh)
    if sizes.whole:
        again = life.forward(keeps=True)
        back = fullest([Moment(again.bytes + life.bytes["output"], f"{again.where} again"), back])
        moves = life.bytes["x"]
    apart = sizes.whole or sizes.offloads
    device = stays + layer.scores * apart + tables  # tables are no saved tensors: they stay when a layer goes
    return LayerMemory(
        kept=Kept(device, moves) if sizes.offloads else Kept(device + moves),
        forward=life.forward(keeps=not sizes.whole),
        backward=Moment(back.bytes + stays + tables * (1 + sizes.whole), back.where),
        score_gradients=layer.scores,
    )


def head_kept(sizes: Sizes) -> float:
    """Last norm, head and loss: input and output of the norm, the head's weight, targets, and the logits if few."""
    model = sizes.model
    wide = 2 * sizes.values(model.hidden_size) + sizes.cast(model.vocab_size * model.hidden_size)
    return wide + (FLOAT32 + INT64 + 1) * sizes.tokens + (_logits(sizes) if _chunks(sizes) == 1 else 0.0)


def loss_moments(sizes: Sizes) -> Iterator[Moment]:
    """Bytes besides all that is kept, while the loss and its gradients are computed."""
    model, item, one = sizes.model, sizes.item, sizes.values(sizes.model.hidden_size)
    weight, chunks = model.vocab_size * model.hidden_size, _chunks(sizes)
    counts = INT64 * sizes.tokens * model.num_experts_per_tok * model.n_routed_experts
    yield Moment(counts * sizes.balanced - head_kept(sizes), "loss: balance of experts")
    wide = 2 * sizes.float32(model.hidden_size) / chunks + one / chunks
    if chunks == 1:
        yield Moment(one + wide, "loss's gradient: hidden states")
        yield Moment(2 * one + item * weight, "loss's gradient: head")
    else:
        block, total = item * KEPT_LOGITS, (FLOAT32 if chunks > 2 else item) * weight
        yield Moment(one + block + max(total + item * weight + one / chunks, wide), "loss's gradient: head")
        yield Moment(one + (2 * item + FLOAT32) * weight, "loss's gradient: head")
    released = one + sizes.cast(weight) + INT64 * sizes.tokens + (_logits(sizes) if chunks == 1 else 0.0)
    yield Moment(one + sizes.gradient(weight) - released, "loss's gradient: head")


def embedding_moment(sizes: Sizes) -> Moment:
    """Bytes while the embedding's gradient is computed, when the layers are done."""
    hidden, weight = sizes.model.hidden_size, sizes.model.vocab_size * sizes.model.hidden_size
    wide = 0.0 if sizes.item == sizes.parameter else sizes.parameter * sizes.tokens * hidden
    return Moment(sizes.values(hidden) + wide + sizes.parameter * weight + sizes.summed(weight), "embedding's gradient")


def _logits(sizes: Sizes) -> float:
    return sizes.values(sizes.model.vocab_size)


def _chunks(sizes: Sizes) -> int:
    """Parts of a micro-batch whose logits are there at once; of several none are kept."""
    return ceil(sizes.tokens / max(1, KEPT_LOGITS // sizes.model.vocab_size))
