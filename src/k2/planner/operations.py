"""How the plan describes what a layer allocates: operations, forms that tensors take between the passes, sizes."""

from dataclasses import dataclass, field
from math import ceil

from k2.config.model import ModelConfig, Recompute
from k2.config.pretrain import PretrainConfig
from k2.planner.layout import Layout

FLOAT32, INT64 = 4, 8
ITEM = {"bfloat16": 2, "float32": 4}
FP8_TILE = 128


@dataclass(frozen=True)
class Operation:
    """One node of the graph that autograd records.

    reads: tensors that it makes gradients of; there is one in the size of each.
    makes: tensors and their bytes; `saves` are those that its backward pass needs, whoever made them.
    weights: values of its weights.
    forward: the most bytes besides what it reads and makes.
    backward: the most besides what it needs and gradients of what it made; with the gradients that it makes.
    passes: it adds: every gradient it makes is the one it gets.
    """

    name: str
    reads: tuple[str, ...]
    makes: dict[str, float]
    saves: tuple[str, ...] = ()
    weights: float = 0.0
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

    @classmethod
    def of(cls, config: PretrainConfig, layout: Layout, cpu: bool) -> "Sizes":
        """Those of a rank's micro-batch under a layout."""
        whole = "layers" in layout.recompute
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

    def cast(self, values: float) -> float:
        """Weights in the precision of activations, where they have another one."""
        return 0.0 if self.item == self.parameter else self.item * values

    def gradient(self, values: float) -> float:
        """Of a weight: a product in the precision of activations, then as the sum in float32 takes it."""
        return self.item * values + self.widened(values)

    def summed(self, values: float) -> float:
        """What it takes to add a weight's gradient to the sum in float32, if it is another type than the weight."""
        return 0.0 if self.parameter == FLOAT32 else FLOAT32 * values

    def widened(self, values: float) -> float:
        """A gradient in the precision of activations, as the sum in float32 takes it, whatever the weight is."""
        return 0.0 if self.item == FLOAT32 else FLOAT32 * values

    def fp8_form(self, width: int, rows: float = 1.0, besides: float = 0.0) -> Form:
        """Codes and a scale for 128 of them. A CPU has several float32 tensors meanwhile (`fp8_reference`)."""
        padded, tokens = FP8_TILE * ceil(width / FP8_TILE), self.tokens * rows
        kept = tokens * (width + FLOAT32 * padded / FP8_TILE)
        if not self.cpu:
            return Form(kept, besides, self.values(width, rows))
        return Form(kept, besides + 2 * FLOAT32 * tokens * padded, FLOAT32 * tokens * (2 * width + padded))
