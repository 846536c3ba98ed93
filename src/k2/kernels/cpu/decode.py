"""Generation in C: the forward pass through all layers in one call, and the draw of tokens.

Weights are packed once in the order they are read. What a token gets does not depend on what else is in the batch.

Letters in shapes: T tokens, B batch rows, Z heads times C, V vocabulary, D hidden, H heads, K latent rank, R rotary,
C = R + K, W value width of a head, Y = H * W, E experts, F expert hidden, G = 2F, Q query latents, I inputs, O outputs,
S cache rows, L slots of a row, N layers.
"""

from collections.abc import Callable, Iterable
from ctypes import Structure, addressof, byref, c_float, c_long, c_void_p
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from k2.config.model import ModelConfig
from k2.kernels.cpu.build import library

PANEL: Final = 32  # outputs of a panel in products.h
HALF: Final = PANEL // 2
TOKENS: Final = 256  # most tokens of one call: what they need stays in a core's second cache
SLACK: Final = 4 * HALF  # values beyond the end of memory that are read and not used


@dataclass(frozen=True)
class LayerWeights:
    """One layer; norms' gains, the scale of attention and the keys' projection are folded in.

    joined_OD: first projections of queries (Q, or Z without a latent rank), then of rotary key and latents (C).
    q_b_ZQ: queries of all heads, the rotary part first in each; None without a latent rank.
    gate_up_EGD, down_EDF: experts that a router chooses from, then those of every token: shared ones or a dense MLP.
    router_ED, bias_E: float32; None without routed experts.
    """

    joined_OD: Tensor
    q_b_ZQ: Tensor | None
    values_HWK: Tensor
    output_DY: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor
    router_ED: Tensor | None
    bias_E: Tensor | None


class _Matrices(Structure):
    _fields_ = [("packed", c_void_p), ("inputs", c_long), ("outputs", c_long)]


class _Layer(Structure):
    _fields_ = [
        *((name, _Matrices) for name in ("joined", "q_b", "values", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("router", "bias")),
        *((name, c_long) for name in ("routed", "shared")),
    ]


class _Model(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("layers", "embedding")),
        ("head", _Matrices),
        *((name, c_long) for name in ("depth", "hidden", "heads", "rank", "rotary", "choices")),
        *((name, c_long) for name in ("normed", "groups", "open_groups")),
        *((name, c_float) for name in ("eps", "latent_eps", "scaling")),
    ]


class _Cache(Structure):
    _fields_ = [("values", c_void_p), ("turns", c_void_p), ("rows", c_long), ("length", c_long)]


_MEMORY: Final = {
    torch.float32: ("x", "joined", "queries", "weights"),
    torch.bfloat16: ("normed", "latents", "mixed", "values", "inner"),
    torch.int64: ("chosen", "tokens", "starts"),
}


class _Memory(Structure):
    _fields_ = [(name, c_void_p) for names in _MEMORY.values() for name in names]


@cache
def _functions() -> Any:
    kernels: Any = library()
    kernels.decode.argtypes = [c_void_p] * 6 + [c_long, c_void_p]
    kernels.packed_product.argtypes = [c_void_p, c_void_p, c_long, c_long, c_void_p]
    kernels.draw.argtypes = [c_void_p] * 7 + [c_long] * 2
    for function in (kernels.decode, kernels.packed_product, kernels.draw):
        function.restype = None
    return kernels


class Packed:
    """Bfloat16 matrices [E, O, I] of one shape, packed for products with few rows."""

    def __init__(self, weight_EOI: Tensor) -> None:
        _, outputs, inputs = weight_EOI.shape
        padded = F.pad(weight_EOI.bfloat16(), (0, inputs % 2, 0, -outputs % PANEL))
        self.values = padded.view(len(padded), -1, PANEL, padded.shape[2] // 2, 2).transpose(2, 3).contiguous()
        self.matrices = _Matrices(self.values.data_ptr(), inputs, outputs)

    def product(self, x_TI: Tensor, number: int, out_TO: Tensor) -> Callable[[], None]:
        """[T, I] bfloat16, I even, times the transpose of matrix `number` into [T, O] float32, when it is called."""
        function = _functions().packed_product
        arguments = x_TI.data_ptr(), byref(self.matrices), number, len(x_TI), out_TO.data_ptr()

        def call(*_kept: object) -> None:
            function(*arguments)

        return partial(call, self, x_TI, out_TO)


class PackedLayer:
    """The matrices of a layer by the name they have in decode.c; `routed` experts come before `shared` ones."""

    def __init__(self, weights: LayerWeights) -> None:
        gate_up_EGD, down_EDF = _by_halves(weights.gate_up_EGD), weights.down_EDF
        down_EDF = F.pad(down_EDF, (0, -down_EDF.shape[2] % HALF))
        matrices = {
            "joined": weights.joined_OD[None],
            "q_b": None if weights.q_b_ZQ is None else weights.q_b_ZQ[None],
            "values": weights.values_HWK,
            "output": weights.output_DY[None],
            "gate_up": gate_up_EGD,
            "down": down_EDF,
        }
        self.products = {name: Packed(weight) for name, weight in matrices.items() if weight is not None}
        self.routed = 0 if weights.router_ED is None else len(weights.router_ED)
        self.shared = len(down_EDF) - self.routed
        self.router = [] if weights.router_ED is None else _router(weights)
        self.structure = _Layer(
            **{name: product.matrices for name, product in self.products.items()},
            **{name: tensor.data_ptr() for name, tensor in zip(("router", "bias"), self.router, strict=False)},
            routed=self.routed,
            shared=self.shared,
        )


def _by_halves(gate_up_EGD: Tensor) -> Tensor:
    """Half a panel of gates and their ups in turn."""
    count, _, inputs = gate_up_EGD.shape
    padded = F.pad(gate_up_EGD.view(count, 2, -1, inputs), (0, 0, 0, -gate_up_EGD.shape[1] // 2 % HALF))
    return padded.view(count, 2, -1, HALF, inputs).transpose(1, 2).reshape(count, -1, inputs)


def _router(weights: LayerWeights) -> list[Tensor]:
    assert weights.router_ED is not None
    assert weights.bias_E is not None
    experts, hidden = weights.router_ED.shape
    router_DE = F.pad(weights.router_ED.T.float(), (0, -experts % HALF, 0, hidden % 2)).contiguous()
    return [router_DE, F.pad(weights.bias_E.float(), (0, -experts % HALF), value=-torch.inf)]


class PackedModel:
    """All weights of a model, packed; `scaling` is the factor of routed experts."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[LayerWeights],
        embedding_VD: Tensor,
        head_VD: Tensor,
        *,
        scaling: float,
        latent_eps: float,
    ) -> None:
        self.config, self.embedding_VD = config, embedding_VD
        self.head, self.layers = Packed(head_VD[None]), [PackedLayer(layer) for layer in layers]
        self._array = (_Layer * len(self.layers))(*(layer.structure for layer in self.layers))
        self.structure = _Model(
            layers=addressof(self._array),
            embedding=embedding_VD.data_ptr(),
            head=self.head.matrices,
            depth=len(self.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            rank=config.kv_lora_rank,
            rotary=config.qk_rope_head_dim,
            choices=config.num_experts_per_tok,
            normed=config.norm_topk_prob,
            groups=config.n_group,
            open_groups=config.topk_group,
            eps=config.rms_norm_eps,
            latent_eps=latent_eps,
            scaling=scaling,
        )


class _Work:
    """What a call needs for its tokens; zero where widths are padded."""

    def __init__(self, model: PackedModel) -> None:
        config = model.config
        heads, choices = config.num_attention_heads, config.num_experts_per_tok
        widths = {
            "x": config.hidden_size,
            "joined": model.layers[0].products["joined"].matrices.outputs,
            "queries": heads * (config.kv_lora_rank + config.qk_rope_head_dim),
            "weights": 2 * choices,
            "normed": config.hidden_size + 1,
            "latents": (config.q_lora_rank or 0) + 1,
            "mixed": heads * (config.kv_lora_rank + 1),
            "values": heads * config.v_head_dim + 1,
            "inner": max(layer.products["down"].matrices.inputs for layer in model.layers),
            "chosen": choices,
            "tokens": choices,
            "starts": config.n_routed_experts // TOKENS + 1,
        }
        sizes = {name: TOKENS * width + SLACK for name, width in widths.items()}
        types = {name: dtype for dtype, names in _MEMORY.items() for name in names}
        self._tensors = {name: torch.zeros(size, dtype=types[name]) for name, size in sizes.items()}
        self.pointers = _Memory(**{name: tensor.data_ptr() for name, tensor in self._tensors.items()})


class Stepper:
    """Runs a packed model over a float32 cache [N, S, L, C]; `turns_LR` are cosine and sine of each rotary pair.

    SLACK values beyond the end of the cache must be readable.
    """

    def __init__(self, model: PackedModel, cache_NSLC: Tensor, turns_LR: Tensor) -> None:
        _, rows, length, _ = cache_NSLC.shape
        self.model, self._tensors, self._memory = model, (cache_NSLC, turns_LR), _Work(model)
        self._cache = _Cache(cache_NSLC.data_ptr(), turns_LR.data_ptr(), rows, length)

    def fill(self, tokens_T: Tensor, rows_T: Tensor, slots_T: Tensor) -> None:
        """Put token t into slot `slots[t]` of cache row `rows[t]` (int64); a row's tokens come in order."""
        self._run(tokens_T, rows_T, slots_T, None)

    def logits(self, tokens_T: Tensor, rows_T: Tensor, slots_T: Tensor) -> Tensor:
        """`fill`; logits [T, V] float32 of the tokens that follow."""
        logits_TV = torch.empty(len(tokens_T), self.model.head.matrices.outputs)
        self._run(tokens_T, rows_T, slots_T, logits_TV)
        return logits_TV

    def _run(self, tokens_T: Tensor, rows_T: Tensor, slots_T: Tensor, logits_TV: Tensor | None) -> None:
        structures = byref(self.model.structure), byref(self._cache), byref(self._memory.pointers)
        for start in range(0, len(tokens_T), TOKENS):
            part = slice(start, start + TOKENS)
            inputs = [x[part].data_ptr() for x in (tokens_T, rows_T, slots_T)]
            logits = None if logits_TV is None else logits_TV[part].data_ptr()
            _functions().decode(*structures, *inputs, len(tokens_T[part]), logits)


def draw(
    logits_BV: Tensor, temperature_B: Tensor, greedy_B: Tensor, uniform_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A token of each row, its log-probability as sampled, and the one at temperature 1.

    Logits and temperatures are float32, `uniform_B` float64 in [0, 1). Greedy (bool) rows take the most likely token,
    and their first log-probability is 0.
    """
    rows, vocabulary = logits_BV.shape
    tokens_B, sampled_B, policy_B = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    inputs = (tensor.contiguous() for tensor in (logits_BV, temperature_B, greedy_B, uniform_B))
    tensors = [*inputs, tokens_B, sampled_B, policy_B]
    _functions().draw(*(tensor.data_ptr() for tensor in tensors), rows, vocabulary)
    return tokens_B, sampled_B, policy_B
