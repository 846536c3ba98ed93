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
from k2.planner.operations import FLOAT32, INT64, PANEL, Sizes

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
    gradients: those of weights that come with the backward pass and stay.
    """

    kept: Kept
    forward: Moment
    backward: Moment
    score_gradients: float
    gradients: float


@lru_cache(maxsize=4096)
def layer_memory(sizes: Sizes, dense: bool) -> LayerMemory:
    """A dense layer or one with experts."""
    layer = layer_of(sizes, dense)
    life = Lifetimes(layer)
    moves, stays, tables = life.kept(), layer.denominators, layer.tables
    back = life.backward()
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
        gradients=sum(each.gradients for each in layer.operations),
    )


def head_kept(sizes: Sizes) -> float:
    """Last norm, head and loss: input and output of the norm, targets, and the logits if few."""
    few = _logits(sizes) if _rows(sizes) == sizes.tokens else 0.0
    return 2 * sizes.values(sizes.model.hidden_size) + _copy(sizes) + (FLOAT32 + INT64 + 1) * sizes.tokens + few


def head_gradients(sizes: Sizes) -> float:
    """Of norm and head: bytes that come with the backward pass and stay."""
    return sizes.stays(sizes.model.hidden_size) + sizes.stays(sizes.model.vocab_size * sizes.model.hidden_size)


def embedding_gradient(sizes: Sizes) -> float:
    """As `head_gradients`; torch makes it, in new memory."""
    return float(FLOAT32 * sizes.model.vocab_size * sizes.model.hidden_size * sizes.fresh)


def loss_moments(sizes: Sizes) -> Iterator[Moment]:
    """Bytes besides all that is kept, while the loss and its gradients are computed."""
    model, one, rows = sizes.model, sizes.values(sizes.model.hidden_size), _rows(sizes)
    weight, part = model.vocab_size * model.hidden_size, sizes.item * rows * model.hidden_size
    chunks = ceil(sizes.tokens / rows)
    counts = INT64 * sizes.tokens * model.num_experts_per_tok * model.n_routed_experts
    yield Moment(counts * sizes.balanced - head_kept(sizes), "loss: balance of experts")
    block = 0.0 if chunks == 1 else sizes.item * rows * model.vocab_size
    wide = 0.0 if sizes.cpu else 2.0 * FLOAT32 * rows * model.hidden_size
    back = max(wide, sizes.panels(model.vocab_size, model.hidden_size))
    yield Moment(one + block + part + back, "loss's gradient: hidden states")
    packed = part + sizes.panels(rows, PANEL) + sizes.panels(rows, model.hidden_size)
    term = (sizes.parameter if sizes.cpu else sizes.item) * weight
    first, wide = min(term, sizes.made(weight)), 0.0 if term == FLOAT32 * weight else FLOAT32 * weight
    if chunks == 1:
        yield Moment(one + packed + first, "loss's gradient: head")
    else:
        total = first if chunks == 2 else max(first, wide)
        yield Moment(one + block + packed + total + term, "loss's gradient: head")
        yield Moment(one + first + term + wide, "loss's gradient: head")
    released = one + _copy(sizes) + INT64 * sizes.tokens + (_logits(sizes) if chunks == 1 else 0.0)
    yield Moment(one + first + wide - released, "loss's gradient: head")


def _copy(sizes: Sizes) -> float:
    """The head's weight, rounded: what a GPU computes with."""
    return 0.0 if sizes.cpu else sizes.cast(sizes.model.vocab_size * sizes.model.hidden_size)


def embedding_moment(sizes: Sizes) -> Moment:
    """Bytes while the embedding's gradient is computed, when the layers are done."""
    hidden, weight = sizes.model.hidden_size, sizes.model.vocab_size * sizes.model.hidden_size
    wide = 0.0 if sizes.item == sizes.parameter else sizes.parameter * sizes.tokens * hidden
    return Moment(sizes.values(hidden) + wide + sizes.parameter * weight + sizes.summed(weight), "embedding's gradient")


def _logits(sizes: Sizes) -> float:
    return sizes.values(sizes.model.vocab_size)


def _rows(sizes: Sizes) -> int:
    """Tokens whose logits are there at once; they are kept only if that is all."""
    return min(sizes.tokens, max(1, KEPT_LOGITS // sizes.model.vocab_size))
