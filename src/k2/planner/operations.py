"""How the plan describes what a layer allocates: operations, forms that tensors take between the passes, sizes."""

from dataclasses import dataclass, field
from math import ceil

from k2.config.model import ModelConfig, Recompute
from k2.config.pretrain import PretrainConfig
from k2.planner.layout import Layout

FLOAT32, INT64 = 4, 8
ITEM = {"bfloat16": 2, "float32": 4}
FP8_TILE = 128
PANEL = 64
"""Columns of a packed factor of a product (`k2.kernels.cpu.gemm`)."""
LEFT_BYTES = 1 << 18
"""The smallest gradient of a weight whose memory one step leaves to the next (`k2.kernels.cpu.spare`)."""


def padded(columns: int) -> int:
    """Columns of whole panels."""
    return PANEL * ceil(columns / PANEL)


@dataclass(frozen=True)
class Operation:
    """One node of the graph that autograd records.

    reads: tensors that it makes gradients of; there is one in the size of each.
    makes: tensors and their bytes; `saves` are those that its backward pass needs, whoever made them.
    gradients: bytes of its weights' gradients that come as it runs backward, and stay.
    forward: the most bytes besides what it reads and makes.
    backward: the most besides what it needs and gradients of what it made; with the gradients that it makes.
    passes: it adds: every gradient it makes is the one it gets.
    """

    name: str
    reads: tuple[str, ...]
    makes: dict[str, float]
    saves: tuple[str, ...] = ()
    gradients: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    passes: bool = False


@dataclass(frozen=True)
class Form:
    """How a tensor waits for the backward pass if not as it is.

    kept: bytes that wait instead.
    making: bytes needed besides to bring it into this form. back: the most that there is on the way back, it included.
    sources: tensors it is computed from again; `together`: tensors that come back with it.
    """

    kept: float = 0.0
    making: float = 0.0
    back: float = 0.0
    sources: tuple[str, ...] = ()
    together: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """The operations of a layer from `x` to `output`, and the forms that switches give to its tensors.

    scores, denominators: bytes that the balance loss holds on the device, whatever the switches say; the former are a
        tensor of the layer as well.
    tables: bytes of the order of rows, which no switch moves.
    """

    operations: tuple[Operation, ...]
    forms: dict[str, Form] = field(default_factory=dict)
    scores: float = 0.0
    denominators: float = 0.0
    tables: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """What sizes depend on: a model, a micro-batch and the switches; bytes of tensors with so many values a token.

    whole: layers are computed again as wholes; then no other switch but `offloads` changes a layer.
    balanced: there is a balance loss. masked: documents of a row do not see each other.
    fresh: a step is one micro-batch: gradients of weights stay, as none are there to add to.
    left: memory of large ones is there from the step before.
    """

    model: ModelConfig
    tokens: int
    context: int
    item: int
    parameter: int
    recompute: tuple[Recompute, ...]
    fp8: bool
    offloads: bool
    ep: int
    balanced: bool
    masked: bool
    cpu: bool
    fresh: bool
    left: bool

    @classmethod
    def of(cls, config: PretrainConfig, layout: Layout, cpu: bool) -> "Sizes":
        """Those of a rank's micro-batch under a layout."""
        whole, fresh = "layers" in layout.recompute, layout.micro_batches(config.batch_tokens) == 1
        masters = ITEM[config.precision] < ITEM[config.param_dtype]
        return cls(
            model=config.model,
            tokens=layout.micro_batch_tokens,
            context=config.context_length,
            item=ITEM[config.precision],
            parameter=ITEM[config.param_dtype],
            recompute=("layers",) if whole else layout.recompute,
            fp8=layout.fp8_storage and not whole,
            offloads=layout.offload_activations,
            ep=layout.ep,
            balanced=config.balance_loss_weight > 0,
            masked=config.mask_documents,
            cpu=cpu,
            fresh=fresh,
            left=cpu and fresh and masters and layout.ranks == 1,
        )

    @property
    def whole(self) -> bool:
        """Whether layers are computed again as wholes."""
        return "layers" in self.recompute

    def values(self, width: float, rows: float = 1.0) -> float:
        """As they are computed."""
        return self.item * self.tokens * rows * width

    def float32(self, width: float, rows: float = 1.0) -> float:
        """Widened."""
        return FLOAT32 * self.tokens * rows * width

    def panels(self, summed: float, columns: int) -> float:
        """A packed factor of a product on a CPU."""
        return self.item * summed * padded(columns) if self.cpu else 0.0

    def cast(self, values: float) -> float:
        """Weights in the precision of activations, where they have another one."""
        return 0.0 if self.item == self.parameter else self.item * values

    def made(self, values: float) -> float:
        """A weight's gradient as a product gives it; nothing if it goes where the one of the step before was."""
        return 0.0 if self._left(values) else self.parameter * values

    def stays(self, values: float) -> float:
        """What of it is new and stays: there is nothing to add it to."""
        return FLOAT32 * values if self.fresh and not self._left(values) else 0.0

    def _left(self, values: float) -> bool:
        return self.left and self.parameter * values >= LEFT_BYTES

    def summed(self, values: float) -> float:
        """What it takes to add a weight's gradient to the sum in float32, if it is another type than the weight."""
        return 0.0 if self.parameter == FLOAT32 else FLOAT32 * values

    def fp8_form(self, width: int, rows: float = 1.0, besides: float = 0.0) -> Form:
        """Codes and a scale for 128 of them. A CPU has several float32 tensors meanwhile (`fp8_reference`)."""
        wide, tokens = FP8_TILE * ceil(width / FP8_TILE), self.tokens * rows
        kept = tokens * (width + FLOAT32 * wide / FP8_TILE)
        if not self.cpu:
            return Form(kept, besides, self.values(width, rows))
        return Form(kept, besides + 2 * FLOAT32 * tokens * wide, FLOAT32 * tokens * (2 * width + wide))
