"""Our Triton kernels against torch, torch._grouped_mm, SDPA and Liger on the CUDA GPU of this machine.

Prints one JSON row per claim: the ratio of the peer's time to ours with its spread, how far our time is from the
roofline of an H100, and the relative error of our result. Sizes are Kimi K2's. Exits with 2 where there is no GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from k2.config.base import Kernels
from k2.config.model import ModelConfig
from k2.kernels import attention, fp8, grouped_gemm, int4, linear_cross_entropy, rms_norm, router, swiglu, symmetric
from k2.kernels.attention import Documents
from k2.kernels.budgets import committed, launches
from k2.kernels.roofline import roofline
from k2.model.backend import use_kernels
from k2.model.mla import attention_context
from k2.model.transformer import DecoderLayer
from k2.optim.schemes import SCHEMES
from k2.quant.int4 import dequantize, pack, quantize

try:
    from liger_kernel.transformers import functional as liger
except ImportError:
    liger = None

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Kimi K2 over 16 expert-parallel GPUs, 4,096 tokens on each."""

    tokens: int = 4096
    hidden: int = 7168
    width: int = 2048
    experts: int = 384
    local_experts: int = 24
    choices: int = 8
    heads: int = 64
    content: int = 128
    rotary: int = 64
    vocabulary: int = 163840


@dataclass(frozen=True)
class Case:
    """One claim. `ours` and the first peer compute the same; `inputs` get gradients when `backward`."""

    claim: str
    ours: Run
    peers: dict[str, Run]
    launches: tuple[str, ...]
    inputs: tuple[Tensor, ...] = field(default=())

    def run(self, forward: Run) -> tuple[Tensor, ...]:
        """The result and, for a differentiable case, its gradients, backwards from an uneven one."""
        result = forward()
        if not self.inputs:
            return (result,)
        grad = torch.linspace(-1, 1, result.numel(), device=result.device).to(result.dtype).view(result.shape)
        return (result, *torch.autograd.grad(result, self.inputs, grad))


def cases(sizes: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """All claims, made one at a time: each takes gigabytes."""

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(0.1).requires_grad_(grad)

    yield grouped_case(sizes, draw, device)
    yield swiglu_case(sizes, draw)
    yield norm_case(sizes, draw)
    yield attention_case(sizes, draw, device)
    yield loss_case(sizes, draw, device)
    yield newton_schulz_case(sizes, draw)
    yield router_case(sizes, device)
    yield fake_quantize_case(sizes, draw)
    yield int4_case(sizes, draw)
    yield fp8_case(sizes, draw)
    yield layer_case(sizes, draw, device)


def grouped_case(s: Sizes, draw: Callable[..., Tensor], device: str) -> Case:
    """Gate and up of the local experts, uneven groups."""
    rows = s.tokens * s.choices
    x, weight = draw(rows, s.hidden), draw(s.local_experts, 2 * s.width, s.hidden)
    bounds = torch.randint(rows + 1, (s.local_experts - 1,), device=device).sort().values
    offsets = F.pad(F.pad(bounds, (1, 0)), (0, 1), value=rows).int()
    return Case(
        "grouped GEMM, forward and backward",
        lambda: grouped_gemm.grouped_gemm(x, weight, offsets),
        {
            "torch loop": lambda: grouped_gemm.reference(x, weight, offsets),
            "torch._grouped_mm": lambda: torch._grouped_mm(x, weight.mT, offs=offsets[1:]),
        },
        ("grouped_gemm.forward", "grouped_gemm.grad_rows", "grouped_gemm.grad_weight"),
        (x, weight),
    )


def swiglu_case(s: Sizes, draw: Callable[..., Tensor]) -> Case:
    """The experts' activation; Liger's does not know the routing weight."""
    x = draw(s.tokens * s.choices, 2 * s.width)
    scale = torch.rand(len(x), device=x.device)
    peers: dict[str, Run] = {"torch": lambda: swiglu.reference(x, scale)}
    if liger:
        peers["Liger without weights"] = lambda: liger.liger_swiglu(*x.chunk(2, dim=-1))
    return Case(
        "SwiGLU, forward and backward",
        lambda: swiglu.swiglu(x, scale),
        peers,
        ("swiglu.forward", "swiglu.backward"),
        (x,),
    )


def norm_case(s: Sizes, draw: Callable[..., Tensor]) -> Case:
    """A block's norm."""
    x, weight = draw(s.tokens, s.hidden), draw(s.hidden)
    peers: dict[str, Run] = {
        "torch": lambda: rms_norm.reference(x, weight, 1e-6),
        "torch rms_norm": lambda: F.rms_norm(x, (s.hidden,), weight, 1e-6),
    }
    if liger:
        peers["Liger"] = lambda: liger.liger_rms_norm(x, weight, 1e-6, in_place=False)
    return Case(
        "RMSNorm, forward and backward", lambda: rms_norm.rms_norm(x, weight, 1e-6), peers,
        ("rms_norm.forward", "rms_norm.backward"), (x, weight),
    )  # fmt: skip


def attention_case(s: Sizes, draw: Callable[..., Tensor], device: str) -> Case:
    """One document of all tokens: what SDPA can do, which gives no maximum logit."""
    qc, kc, v = (draw(s.tokens, s.heads, s.content) for _ in range(3))
    qr, kr = draw(s.tokens, s.heads, s.rotary), draw(s.tokens, s.rotary)
    scale = (s.content + s.rotary) ** -0.5
    documents = Documents.of(torch.tensor([0, s.tokens], device=device), s.tokens)

    def sdpa() -> Tensor:
        shared = kr[:, None].expand(-1, s.heads, -1)
        q, k = torch.cat([qc, qr], -1), torch.cat([kc, shared], -1)
        q, k, values = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, values, is_causal=True, scale=scale)[0].transpose(0, 1)

    return Case(
        "MLA attention with maximum logits, forward and backward",
        lambda: attention.mla_attention(qc, qr, kc, kr, v, documents, scale)[0],
        {"SDPA without maximum": sdpa},
        ("attention.forward", "attention.grad_queries", "attention.grad_keys"),
        (qc, qr, kc, kr, v),
    )


def loss_case(s: Sizes, draw: Callable[..., Tensor], device: str) -> Case:
    """The output head and the loss."""
    hidden, weight = draw(s.tokens, s.hidden), draw(s.vocabulary, s.hidden)
    target = torch.randint(s.vocabulary, (s.tokens,), device=device)
    peers: dict[str, Run] = {"torch": lambda: linear_cross_entropy.reference(hidden, weight, target)}
    if liger:
        peers["Liger"] = lambda: liger.liger_fused_linear_cross_entropy(hidden, weight, target, reduction="sum")
    return Case(
        "linear + cross-entropy, forward and backward",
        lambda: linear_cross_entropy.linear_cross_entropy(hidden, weight, target), peers,
        ("linear_cross_entropy.forward", "linear_cross_entropy.grad_logits"), (hidden, weight),
    )  # fmt: skip


def newton_schulz_case(s: Sizes, draw: Callable[..., Tensor]) -> Case:
    """The gate matrices of the local experts."""
    matrices = draw(s.local_experts, s.width, s.hidden, grad=False)
    scheme = SCHEMES["moonlight"]

    def ordinary() -> Tensor:
        x = matrices / torch.linalg.vector_norm(matrices.float(), dim=(1, 2), keepdim=True).to(matrices.dtype)
        for a, b, c in scheme.polynomials:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    return Case(
        "Newton-Schulz, Moonlight's five steps", lambda: symmetric.newton_schulz(matrices, scheme),
        {"torch baddbmm": ordinary}, (),
    )  # fmt: skip


def router_case(s: Sizes, device: str) -> Case:
    """From logits to weights and permutation."""
    logits = torch.randn(s.tokens, s.experts, device=device, requires_grad=True)
    bias = torch.zeros(s.experts, device=device)
    return Case(
        "router, forward and backward", lambda: router.route(logits, bias, s.choices, 2.827).weights_TS,
        {"torch": lambda: router.reference(logits, bias, s.choices, 2.827).weights_TS},
        ("router.choose", "router.rows", "router.backward"), (logits,),
    )  # fmt: skip


def fake_quantize_case(s: Sizes, draw: Callable[..., Tensor]) -> Case:
    """Gate and up of the local experts, forward only: the gradient is the identity."""
    weight = draw(s.local_experts, 2 * s.width, s.hidden, grad=False)
    return Case(
        "INT4 fake quantisation", lambda: int4.fake_quantize(weight, 32),
        {"torch": lambda: dequantize(*quantize(weight, 32)).to(weight.dtype)}, ("int4.fake_quantize",),
    )  # fmt: skip


def int4_case(s: Sizes, draw: Callable[..., Tensor]) -> Case:
    """Half of the tokens through one expert's gate and up."""
    values, scale = quantize(draw(2 * s.width, s.hidden, grad=False), 32)
    packed, x = pack(values), draw(s.tokens // 2, s.hidden, grad=False)
    weight = dequantize(values, scale).to(x.dtype)
    return Case(
        "product with INT4 weights", lambda: int4.int4_product(x, packed, scale),
        {"torch, unpacked beforehand": lambda: x @ weight.T, "torch": lambda: int4.reference(x, packed, scale)},
        ("int4.product",),
    )  # fmt: skip


def fp8_case(s: Sizes, draw: Callable[..., Tensor]) -> Case:
    """There and back, as an activation goes."""
    x = draw(s.tokens * s.choices, s.hidden, grad=False)
    return Case(
        "FP8 tiles, quantise and dequantise", lambda: fp8.dequantize(*fp8.quantize(x), x.dtype),
        {"torch": lambda: fp8.reference_dequantize(*fp8.reference_quantize(x), x.dtype)},
        ("fp8.quantize", "fp8.dequantize"),
    )  # fmt: skip


def layer_case(s: Sizes, draw: Callable[..., Tensor], device: str) -> Case:
    """A whole MoE layer of the model with the local experts, by the switch that training uses."""
    config = ModelConfig(
        hidden_size=s.hidden, moe_intermediate_size=s.width, first_k_dense_replace=0, num_attention_heads=s.heads,
        qk_nope_head_dim=s.content, qk_rope_head_dim=s.rotary, v_head_dim=s.content, n_routed_experts=s.local_experts,
        num_experts_per_tok=s.choices, q_lora_rank=min(1536, s.hidden), kv_lora_rank=min(512, s.hidden),
    )  # fmt: skip
    layer, x = DecoderLayer(config, 0).to(device), draw(1, s.tokens, s.hidden)
    for parameter in layer.parameters():
        parameter.data = draw(*parameter.shape, grad=False)

    def through(choice: Kernels) -> Tensor:
        use_kernels(choice)
        output: Tensor = layer(x, attention_context(config, x[..., 0], x.dtype))[0]
        return output

    return Case(
        "a layer of the model, forward and backward", lambda: through("triton"), {"torch": lambda: through("torch")},
        (), (x, *layer.parameters()),
    )  # fmt: skip


def error(case: Case) -> float:
    """Largest relative difference, in the Frobenius norm, of our result and gradients from the first peer's."""
    theirs = case.run(next(iter(case.peers.values())))
    pairs = zip(case.run(case.ours), theirs, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item() for a, b in pairs)


def milliseconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Times between CUDA events, after a warm-up and with a cold L2 before every round."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)


def row(case: Case, rounds: int) -> dict[str, Any]:
    """Peer time over ours, of the fastest peer; the spread is that of both sides together."""
    ours = milliseconds(partial(case.run, case.ours), rounds)
    times = {name: milliseconds(partial(case.run, peer), rounds) for name, peer in case.peers.items()}
    fastest = min(times, key=lambda name: median(times[name]))
    table = committed()
    floor_s = sum(roofline(launch, table).floor_s for launch in launches() if launch.name in case.launches)
    return {
        "claim": case.claim,
        "peer": fastest,
        "ratio": round(median(times[fastest]) / median(ours), 3),
        "low": round(times[fastest][0] / ours[-1], 3),
        "high": round(times[fastest][-1] / ours[0], 3),
        "target": 1.0,
        "better": "higher",
        "ms": round(median(ours), 4),
        "of_h100_roofline": round(1e3 * floor_s / median(ours), 3) if floor_s else None,
        "relative_error": error(case),
        "gpu": torch.cuda.get_device_name(),
    }


def main() -> int:
    """Print the rows; 2 where there is no CUDA GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="rows are JSON with or without it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/gpu.py needs a CUDA GPU and a CUDA build of torch; this machine has none\n")
        return 2
    torch.manual_seed(0)
    for case in cases(Sizes(), "cuda", torch.bfloat16):
        print(json.dumps(row(case, arguments.rounds)), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
