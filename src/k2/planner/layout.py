"""How a model is laid out over ranks: pipeline x expert x data parallelism, and what is done about activations.

A rank is (pp, dp, ep). Routed experts are divided by `ep`; everything else of a pipeline stage is the same on the
`ep * dp` ranks of the stage, which are its data-parallel group (Kimi K2 report, section 2.4).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate, product
from typing import Any, get_args

from k2.config.model import ModelConfig, Recompute
from k2.config.pretrain import PretrainConfig
from k2.errors import UserError
from k2.model.layout import parameter_counts

PUBLISHED_RECOMPUTE: tuple[Recompute, ...] = ("norms", "mla_up_projections", "attention_probabilities")
"""Kimi K2's list (report, section 2.4) less what the engine never keeps, and what flash attention never does."""
_STORED: dict[str, Any] = {"recompute": PUBLISHED_RECOMPUTE, "fp8_storage": True}
ACTIVATION_SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": PUBLISHED_RECOMPUTE},
    _STORED,
    _STORED | {"offload_activations": True},
    _STORED | {"recompute": (*PUBLISHED_RECOMPUTE, "mlp_up_projections"), "offload_activations": True},
    {"recompute": ("layers",), "fp8_storage": False, "offload_activations": True},
)
OPTIMIZER_SWITCHES: tuple[dict[str, Any], ...] = ({"offload_optimizer": False}, {"offload_optimizer": True})
"""What the search tries, cheapest first."""
EMBEDDING = 1.0
"""In layers: a look-up is no work, but the embedding takes a layer's memory (Kimi K2's, 16 expert-parallel ranks)."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism and the switches that trade memory for time.

    pp, ep, dp: pipeline stages, expert-parallel ranks, replicas of the experts.
    virtual_stages: pieces of the model on each pipeline rank (interleaved 1F1B).
    micro_batch_tokens: tokens that pass through a stage at once.
    recompute: what the backward pass computes again (`pretrain.recompute`).
    fp8_storage: inputs of MoE up-projections and of SwiGLU are kept as FP8 E4M3 with a scale for 128 values.
    offload_activations: what is kept for the backward pass goes to the host and is fetched back.
    offload_optimizer: masters and momentum live on the host.
    """

    pp: int = 1
    ep: int = 1
    dp: int = 1
    virtual_stages: int = 1
    micro_batch_tokens: int = 4096
    recompute: tuple[Recompute, ...] = ()
    fp8_storage: bool = False
    offload_activations: bool = False
    offload_optimizer: bool = False

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.pp * self.ep * self.dp

    @property
    def data_parallel(self) -> int:
        """Ranks that each see data of their own."""
        return self.ep * self.dp

    def micro_batches(self, batch_tokens: int) -> int:
        """Micro-batches of one rank in one step."""
        return batch_tokens // (self.data_parallel * self.micro_batch_tokens)

    def problem(self, model: ModelConfig, batch_tokens: int, context: int) -> str | None:
        """Why this layout cannot run this model, or None."""
        chunks = self.pp * self.virtual_stages
        if model.n_routed_experts % self.ep:
            return f"ep={self.ep} does not divide n_routed_experts={model.n_routed_experts}"
        if chunks > model.num_hidden_layers:
            return f"pp={self.pp} x virtual_stages={self.virtual_stages} exceed {model.num_hidden_layers} layers"
        if self.micro_batch_tokens % context:
            return f"micro_batch_tokens={self.micro_batch_tokens} is no multiple of context_length={context}"
        together = self.data_parallel * self.micro_batch_tokens
        if batch_tokens % together or batch_tokens < together:
            return (
                f"batch_tokens={batch_tokens} is no multiple of ep x dp x micro_batch_tokens ="
                f" {self.ep} x {self.dp} x {self.micro_batch_tokens} = {together}"
            )
        if self.virtual_stages > 1 and self.micro_batches(batch_tokens) % self.pp:
            count = self.micro_batches(batch_tokens)
            return f"virtual_stages={self.virtual_stages} needs micro-batches ({count}) in multiples of pp={self.pp}"
        return None


def default_layout(config: PretrainConfig) -> Layout:
    """One rank, one row a micro-batch, and the configuration's switches."""
    return Layout(
        micro_batch_tokens=config.context_length,
        recompute=config.recompute,
        fp8_storage=config.fp8_storage,
        offload_activations=config.offload_activations,
    )


@lru_cache(maxsize=1024)
def layers_of_chunks(model: ModelConfig, pp: int, virtual_stages: int) -> tuple[range, ...]:
    """Consecutive layers of every chunk, one at least; pipeline rank r has the chunks r, r + pp, ...

    Every layer goes to the rank that has least, where the head counts as what it is in layers: 2.2 of Kimi K2's.
    Attention over the context is left out of that, so that all phases have the same division.
    """
    loads = [float(virtual_stages)] * pp
    loads[0] += EMBEDDING
    loads[-1] += _head(model)
    layers = [virtual_stages] * pp
    for _ in range(model.num_hidden_layers - pp * virtual_stages):
        idlest = min(range(pp), key=lambda rank: (loads[rank], abs(2 * rank - pp + 1), rank))
        loads[idlest] += 1.0
        layers[idlest] += 1
    shares = [_shares(count, virtual_stages, rank == 0) for rank, count in enumerate(layers)]
    ends = list(accumulate(share for turn in zip(*shares, strict=True) for share in turn))
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


@lru_cache(maxsize=8)
def _head(model: ModelConfig) -> float:
    """In layers: how many have as many weights that a token meets."""
    outside = model.vocab_size * model.hidden_size
    return outside * model.num_hidden_layers / (parameter_counts(model).active - 2 * outside)


def _shares(layers: int, chunks: int, first: bool) -> list[int]:
    """A rank's layers in its chunks; the first of all chunks, and the last, get no more than the rank's others."""
    base, extra = divmod(layers, chunks)
    shares = [base + (chunk < extra) for chunk in range(chunks)]
    return shares[::-1] if first else shares


def layers_of_rank(model: ModelConfig, layout: Layout, stage: int) -> list[int]:
    """Layers on one pipeline rank, over all its virtual stages."""
    chunks = layers_of_chunks(model, layout.pp, layout.virtual_stages)
    return [layer for chunk in chunks[stage :: layout.pp] for layer in chunk]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def candidates(model: ModelConfig, ranks: int, context: int) -> Iterator[Layout]:
    """Every layout over all ranks that is worth a look, whether or not it divides or fits."""
    for pp in (d for d in divisors(ranks) if d <= model.num_hidden_layers):
        for ep in (d for d in divisors(ranks // pp) if d <= model.n_routed_experts):
            for virtual in (1, 2, 4) if pp > 1 else (1,):
                for rows in (1, 2, 4):
                    base = Layout(pp, ep, ranks // pp // ep, virtual, rows * context)
                    for switches in product(ACTIVATION_SWITCHES, OPTIMIZER_SWITCHES):
                        yield replace(base, **switches[0], **switches[1])


def parse_layout(text: str) -> dict[str, Any]:
    """`pp=16,ep=16,recompute=norms+mla_up_projections,fp8_storage=true` as fields of a layout.

    Raises:
        UserError: not of that form, or no such field.
    """
    defaults = asdict(Layout())
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise UserError(f"--layout {part!r}: write name=value; the names are {', '.join(defaults)}")
        values[name] = _switches(value) if name == "recompute" else _field(name, value, defaults[name] is False)
    return values


def _field(name: str, text: str, switch: bool) -> int | bool:
    if switch and text in ("true", "false"):
        return text == "true"
    if not switch and text.isdecimal() and int(text) > 0:
        return int(text)
    raise UserError(f"--layout {name}={text}: must be {'true or false' if switch else 'a whole number of at least 1'}")


def _switches(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split("+"))
    if unknown := sorted({*names} - {*get_args(Recompute)}):
        raise UserError(f"--layout recompute={text}: {unknown[0]!r} is none of none, {', '.join(get_args(Recompute))}")
    return names


def describe(layout: Layout) -> str:
    """A layout as `--layout` takes it."""
    return ",".join(f"{name}={_shown(value)}" for name, value in asdict(layout).items())


def activation_switches(layout: Layout) -> str:
    """What is done about activations, in words."""
    names = list(layout.recompute) + [name for name in ("fp8_storage", "offload_activations") if getattr(layout, name)]
    return " + ".join(names) or "all kept"


def _shown(value: bool | int | tuple[str, ...]) -> str:
    return ("+".join(value) or "none") if isinstance(value, tuple) else str(value).lower()
